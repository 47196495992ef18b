"""Every family: the streamed pass computes what transformers computes, records the gate weight that the model uses, and
what is pruned loads without a missing or unexpected key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import (
    ids_of,
    observe_and_prune,
    prepared,
    recorded_sum,
    reload,
    routed_of_block,
    streamed_log_probs,
    whole_log_probs,
)
from family_models import CONFIGS, NAMES

from reapc.arch import model_spec
from reapc.arch.config import FAMILIES
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.stream import StreamedModel
from reapc.stream.families import SUPPORTED, check_family


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder, model = prepared(request.param, tmp_path_factory.mktemp("family"))
    return request.param, folder, model


def test_streamed_logits_are_those_of_transformers(family: tuple[str, Path, Any]) -> None:
    _, folder, model = family
    checkpoint = Checkpoint(folder)
    ids, mask = ids_of(checkpoint.spec.vocab_size)
    whole = whole_log_probs(model, ids, mask)
    streamed = streamed_log_probs(StreamedModel(checkpoint), ids, mask)
    assert whole.std() > 0.5  # a model that says something
    assert (whole - streamed)[mask].abs().max() < 1e-4


def test_the_recorded_weight_is_the_one_that_the_model_uses(family: tuple[str, Path, Any]) -> None:
    name, folder, model = family
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    ids, _ = ids_of(spec.vocab_size)
    for index, (total, pairs) in recorded_sum(checkpoint, ids).items():
        assert pairs == ids.numel() * spec.top_k
        if name == "nemotron_h_moe":  # its experts work in a latent space: what they sum to is projected back
            block = model.model.layers[index].mixer
            total = block.fc2_latent_proj(total.float()).double()
        expected = routed_of_block(model, index, spec.num_experts, ids)
        scale = expected.abs().max()
        assert scale > 1e-2
        assert (total - expected).abs().max() < 2e-4 * scale, index


def test_pruned_models_load_and_compute(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, folder, _ = family
    pruned = observe_and_prune(folder, tmp_path)
    checkpoint = Checkpoint(pruned.folder)
    assert checkpoint.spec.num_experts == pruned.kept < pruned.checkpoint.spec.num_experts
    assert checkpoint.spec.mtp_layers == ()
    model, said = reload(pruned.folder)
    assert said["missing_keys"] == set()
    assert said["unexpected_keys"] == set()
    assert said["mismatched_keys"] == set()
    ids, mask = ids_of(checkpoint.spec.vocab_size)
    whole = whole_log_probs(model, ids, mask)
    streamed = streamed_log_probs(StreamedModel(checkpoint), ids, mask)
    assert torch.isfinite(whole[mask]).all()
    assert (whole - streamed)[mask].abs().max() < 1e-4


def test_every_family_is_here_or_refused_by_name() -> None:
    tested = {model_spec(CONFIGS[name]).family for name in NAMES}
    assert tested == set(SUPPORTED)
    spec = model_spec(CONFIGS["kimi-k3"])
    assert {spec.family} | tested >= {model_spec(config).family for config in CONFIGS.values()}
    with pytest.raises(CannotBeDone, match=r"kimi_k3 models cannot be observed(?s:.*)deepseek, .*step3p7"):
        check_family(spec, "here")
    assert FAMILIES
