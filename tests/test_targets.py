"""The hardware targets that come with reapc."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from specs import recipe_of

from reapc.cli.targets import command
from reapc.errors import ReapcError
from reapc.target import known_targets, load_target


def test_every_target_loads_and_says_where_its_figures_come_from() -> None:
    assert len(known_targets()) >= 12
    for name in known_targets():
        target = load_target(name)
        assert target.name == name
        assert target.description
        assert target.source
        assert target.bandwidth
        assert len(target.devices) == max(1, target.gpus)


def test_a_3090_has_its_visible_bytes_and_not_24_gb() -> None:
    target = load_target("rtx3090x8")
    assert [device.capacity_bytes for device in target.devices] == [24123 * 2**20] * 8


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(ReapcError, match="did you mean 'rtx3090x") as caught:
        recipe_of("rtx3090x3")
    assert caught.value.exit_code == 2


def test_cli_lists_and_describes() -> None:
    runner = CliRunner()
    assert "h100x8" in runner.invoke(command, []).output
    assert "23.6 GiB" in runner.invoke(command, ["rtx3090x1"]).output
    assert json.loads(runner.invoke(command, ["rtx3090x1", "--json"]).output)["vram"] == 24123 * 2**20
