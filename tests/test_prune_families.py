"""The surgery of every family, told by the ModelSpec alone: names and shapes of what is written, and whose bytes they
are. That transformers loads it is test_families.py's; here no model is run."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CONFIGS
from mla_models import mtp_tensors
from safetensors.torch import load_file, save_file
from test_glm4_family import Log

from reapc.arch import load_config, model_spec
from reapc.arch.spec import ModelSpec
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.progress import Silent
from reapc.prune.criteria import check_count, groups_of
from reapc.prune.rewrite import prune
from reapc.prune.table import remapped

Tensors = dict[str, torch.Tensor]
VISION = "vision_tower.blocks.0.mlp.gate.weight"  # as many rows as there are experts, and none of theirs


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def random_tensors(config: dict[str, Any]) -> Tensors:
    """Everything that the config implies, MTP layers and a piece of a vision tower too; no two values alike in rows."""
    spec = model_spec(deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    found = {VISION: torch.randn(spec.num_experts, 8, generator=generator).bfloat16()}
    for tensor in (*spec.tensors(), *mtp_tensors(spec)):
        if tensor.name.endswith("tid2eid"):
            order = torch.rand(tensor.shape[0], spec.num_experts, generator=generator).argsort(1)
            found[tensor.name] = order[:, : tensor.shape[1]].contiguous()
        else:
            found[tensor.name] = torch.randn(tensor.shape, generator=generator).bfloat16()
    return found


def checkpoint_of(folder: Path, config: dict[str, Any]) -> Checkpoint:
    return Checkpoint(write(folder, config, random_tensors(config)))


def choice(spec: ModelSpec) -> dict[int, list[int]]:
    """Two thirds of the experts, others in every layer, and of every group of the router as many."""
    size = spec.num_experts // spec.n_group
    each = next(n for n in range(size * 2 // 3, size + 1) if n * spec.topk_group >= spec.top_k and n >= min(size, 2))
    kept = {}
    for layer in spec.moe_layers:
        first = [(layer + i) % size for i in range(each)]
        kept[layer] = sorted(group * size + e for group in range(spec.n_group) for e in first)
    return kept


def expected_of(spec: ModelSpec, source: Tensors, kept: dict[int, list[int]], mtp: bool) -> Tensors:
    """The pruned tensors by torch's own indexing, table of experts left out."""
    found = {VISION: source[VISION]}
    layers = (*spec.layers, *(spec.mtp_layers if mtp else ()))
    for group in (*spec.outer, *(spec.mtp_outer if mtp else ())):
        found[group.name] = source[group.name]
    for layer in layers:
        for group in layer.kind.tensors:
            name = f"{layer.prefix}.{group.name}"
            if "{e}" in name:
                for new, old in enumerate(kept[layer.index]):
                    found[name.replace("{e}", str(new))] = source[name.replace("{e}", str(old))]
            elif group.expert_axis is not None:
                found[name] = source[name].index_select(group.expert_axis, torch.tensor(kept[layer.index]))
            elif not group.names_experts:
                found[name] = source[name]
    return found


def by_router_rows(spec: ModelSpec, source: Tensors, count: int) -> dict[int, list[int]]:
    """What unobserved MTP layers keep: the longest rows of the router, of each group as many."""
    groups, found = groups_of(spec), {}
    for layer in spec.mtp_layers:
        if layer.is_moe:
            router = next(name for name in ("mlp.gate", "ffn.gate", "mixer.gate") if
                          f"{layer.prefix}.{name}.weight" in source)  # fmt: skip
            norms = source[f"{layer.prefix}.{router}.weight"].float().norm(dim=1).reshape(groups, -1)
            best = norms.argsort(dim=1, descending=True)[:, : count // groups]
            found[layer.index] = sorted((best + torch.arange(groups)[:, None] * norms.shape[1]).flatten().tolist())
    return found


@pytest.mark.parametrize("mtp", ["drop", "prune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_names_shapes_and_bytes(name: str, mtp: Any, tmp_path: Path) -> None:
    config = CONFIGS[name]
    spec, source = model_spec(deepcopy(config)), random_tensors(config)
    if mtp == "prune" and not spec.mtp_layers:
        pytest.skip("no MTP layers")
    kept, log = choice(spec), Log()
    values = {layer: np.arange(spec.num_experts, dtype=float) for layer in kept}
    checkpoint = Checkpoint(write(tmp_path / "m", config, source))
    prune(checkpoint, kept, tmp_path / "out", log, mtp=mtp, values=values)

    count = len(next(iter(kept.values())))
    assert count < spec.num_experts
    result, written = Checkpoint(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert result.spec.num_experts == count
    assert len(result.spec.mtp_layers) == (len(spec.mtp_layers) if mtp == "prune" else 0)
    shapes = {t.name: t.shape for t in (*result.spec.tensors(), *mtp_tensors(result.spec))}
    assert {key: tuple(tensor.shape) for key, tensor in written.items() if key != VISION} == shapes
    guessed = by_router_rows(spec, source, count) if mtp == "prune" else {}
    assert any("which is a guess" in line for line in log.lines) == bool(guessed)
    expected = expected_of(spec, source, {**kept, **guessed}, mtp == "prune")
    for key, tensor in expected.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor), key
    assert {key for key in written if key not in expected} == {key for key in source if key.endswith("tid2eid")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_lists_that_count_mtp_layers_are_cut(tmp_path: Path) -> None:
    for name, section, key in (("step3p7", "text_config", "layer_types"), ("deepseek_v4", None, "compress_ratios")):
        checkpoint = checkpoint_of(tmp_path / name, CONFIGS[name])
        values = {layer: np.ones(6) for layer in checkpoint.spec.moe_layers}
        for mtp, length in (("drop", 4), ("prune", 5)):
            prune(checkpoint, choice(checkpoint.spec), tmp_path / name / mtp, Silent(), mtp=mtp, values=values)  # type: ignore[arg-type]
            config = load_config(tmp_path / name / mtp)
            assert len((config[section] if section else config)[key]) == length


def test_scores_of_an_mtp_layer_are_heeded(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "m", CONFIGS["glm4_moe_lite"])
    source, log = load_file(tmp_path / "m" / "model.safetensors"), Log()
    prune(checkpoint, {1: [0, 1, 2], 2: [1, 2, 3], 3: [0, 4, 5]}, tmp_path / "out", log, mtp="prune")
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.3.mlp.gate.weight"
    assert torch.equal(written[name], source[name][[0, 4, 5]])
    assert not any("guess" in line for line in log.lines)


def test_mtp_layers_that_are_not_stored_cannot_be_pruned(tmp_path: Path) -> None:
    tensors = {k: v for k, v in random_tensors(CONFIGS["glm4_moe_lite"]).items() if ".layers.3." not in k}
    checkpoint = Checkpoint(write(tmp_path / "m", CONFIGS["glm4_moe_lite"], tensors))
    with pytest.raises(ReapcError, match=r"'model.layers.3.*is missing(?s:.*)leave them out"):
        prune(checkpoint, choice(checkpoint.spec), tmp_path / "out", Silent(), mtp="prune")
    prune(checkpoint, choice(checkpoint.spec), tmp_path / "out", Silent())


class TestTable:
    """DeepSeek-V4's table from token to experts."""

    def test_by_hand(self) -> None:
        table = np.array([[0, 1], [2, 5], [3, 1], [5, 4], [4, 0]], np.int64)
        # 0, 2, 3, 5 stay as 0, 1, 2, 3; the best of them is 3, then 5, then 0 and 2
        new = remapped(table, [0, 2, 3, 5], np.array([1.0, 99, 1, 5, 99, 3]), "t")
        assert new.tolist() == [[0, 2], [1, 3], [2, 3], [3, 2], [2, 0]]
        assert new.dtype == np.int64

    def test_in_a_checkpoint(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(tmp_path / "m", CONFIGS["deepseek_v4"])
        name, kept = "layers.0.ffn.gate.tid2eid", choice(checkpoint.spec)
        values = {layer: np.array([3.0, 1, 4, 1, 5, 9]) for layer in kept}
        prune(checkpoint, kept, tmp_path / "out", Silent(), values=values)
        old, new = (load_file(tmp_path / f / "model.safetensors")[name].tolist() for f in ("m", "out"))
        best = sorted(range(len(kept[0])), key=lambda i: (-values[0][kept[0][i]], i))
        for before, after in zip(old, new, strict=True):
            assert len(set(after)) == len(before)
            has = {kept[0].index(e) for e in before if e in kept[0]}
            for e, number in zip(before, after, strict=True):
                wanted = kept[0].index(e) if e in kept[0] else next(i for i in best if i not in has)
                has.add(wanted)
                assert number == wanted

    def test_needs_values(self, tmp_path: Path) -> None:
        checkpoint = checkpoint_of(tmp_path / "m", CONFIGS["deepseek_v4"])
        with pytest.raises(ReapcError, match=r"tid2eid'(?s:.*)prune with scores"):
            prune(checkpoint, choice(checkpoint.spec), tmp_path / "out", Silent())

    def test_unknown_expert(self) -> None:
        with pytest.raises(ReapcError, match="t names expert 7: 0 to 5 expected"):
            remapped(np.array([[0, 7]]), [0, 1], np.ones(6), "t")


GROUPS = {**CONFIGS["deepseek_v3"], "n_routed_experts": 24, "n_group": 8, "topk_group": 2, "num_experts_per_tok": 4}


class TestGroups:
    @pytest.mark.parametrize(
        ("count", "near"), [(20, "keep 16 or 24"), (12, "keep 16 "), (8, "keep 16 "), (23, "keep 16 or 24")]
    )
    def test_nearest_counts(self, count: int, near: str) -> None:
        with pytest.raises(ReapcError, match=f"{count} experts do not fill the router's 8 groups") as error:
            check_count(model_spec(GROUPS), count)
        assert near in error.value.hint
        assert error.value.exit_code == 2
        check_count(model_spec(GROUPS), 16)
        check_count(model_spec(GROUPS), count, dissolve=True)

    def test_the_groups_of_a_token_hold_its_experts(self) -> None:
        """2 of 4 groups have to hold 6 experts."""
        spec = model_spec({**GROUPS, "n_group": 4, "num_experts_per_tok": 6})
        with pytest.raises(ReapcError, match=r"keep 12 \(a multiple of 4, at least 12\)"):
            check_count(spec, 8)
        check_count(spec, 12)

    @pytest.mark.parametrize(
        ("config", "keys"),
        [
            (GROUPS, ("n_group", "topk_group")),
            ({**CONFIGS["kimi-linear"], "num_expert_group": 4, "topk_group": 2}, ("num_expert_group", "topk_group")),
        ],
    )
    def test_dissolved(self, config: dict[str, Any], keys: tuple[str, str], tmp_path: Path) -> None:
        checkpoint, log = checkpoint_of(tmp_path / "m", config), Log()
        kept = {layer: [0, 1, 2, 4, 7] for layer in checkpoint.spec.moe_layers}
        with pytest.raises(ReapcError, match="do not fill"):
            prune(checkpoint, kept, tmp_path / "out", log)
        prune(checkpoint, kept, tmp_path / "out", log, dissolve_groups=True)
        config = load_config(tmp_path / "out")
        assert [config[key] for key in keys] == [1, 1]
        spec = Checkpoint(tmp_path / "out").spec
        assert (spec.num_experts, spec.n_group, spec.topk_group) == (5, 1, 1)
        assert any("groups are given up" in line for line in log.lines)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: [0, 1, 2]}, "layer 0 of this glm4_moe_lite model has no experts(?s:.*)layers with experts: 1-3"),
        ({9: [0, 1, 2]}, "layer 9 of this"),
        ({2: None}, "which experts of layer 2 are kept is not said"),
        ({2: [0, 1]}, r"same number of experts, found \[2, 3\]"),
        ({2: [0, 1, 6]}, "layer 2: experts .* rising numbers from 0 to 5"),
        ({2: [1, 1, 2]}, "layer 2: experts .* rising numbers"),
        ({1: [0], 2: [1]}, "1 experts are fewer than the top-k of 2"),
    ],
)
def test_a_wrong_choice_is_refused(change: dict[int, Any], message: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "m", CONFIGS["glm4_moe_lite"])
    kept = {key: value for key, value in ({1: [0, 1, 2], 2: [0, 1, 2]} | change).items() if value is not None}
    with pytest.raises(ReapcError, match=message) as error:
        prune(checkpoint, kept, tmp_path / "out", Silent())
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts = 6 and num_local_experts = 4"),
        ("qwen3_moe", {"n_routed_experts": 4}, "num_experts = 6 and n_routed_experts = 4"),
        ("deepseek_v3", {"num_experts": 4}, "n_routed_experts = 8 and num_experts = 4"),
        ("ernie4_5_moe", {"num_experts": 4}, "moe_num_experts = 6 and num_experts = 4"),
        ("qwen3_vl_moe", {"num_experts": 4}, "text_config.num_experts = 6 and num_experts = 4"),
    ],
)
def test_counts_that_contradict_each_other(name: str, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ReapcError, match=f"{words} contradict each other") as error:
        model_spec({**deepcopy(CONFIGS[name]), **changes})
    assert error.value.exit_code == 2


def test_every_key_that_counts_experts_is_set(tmp_path: Path) -> None:
    config = {**CONFIGS["olmoe"], "num_local_experts": 6, "n_routed_experts": 6}
    checkpoint = checkpoint_of(tmp_path / "m", config)
    prune(checkpoint, choice(checkpoint.spec), tmp_path / "out", Silent())
    result = load_config(tmp_path / "out")
    assert [result[key] for key in ("num_experts", "num_local_experts", "n_routed_experts")] == [4, 4, 4]


def test_tensors_that_do_not_match_the_config(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["olmoe"])
    tensors["model.norm.weight"] = torch.zeros(7)
    for e in range(4):
        del tensors[f"model.layers.0.mlp.experts.{e}.up_proj.weight"]
    with pytest.raises(ReapcError) as error:
        Checkpoint(write(tmp_path / "m", CONFIGS["olmoe"], tensors))
    text = str(error.value)
    assert "'model.norm.weight' has shape [7], config.json implies [64]" in text
    for e, shape in ((0, [96, 64]), (1, [96, 64])):
        assert f"'model.layers.0.mlp.experts.{e}.up_proj.weight' is missing ({shape} expected)" in text
    assert "experts.2." not in text
    assert "and 2 more" in text


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.mlp.expert_scale", (6,), r"expert_scale' \[6\] is not one that olmoe"),
        ("model.layers.1.mlp.experts.2.up_proj.lora_A", (4, 6), "an expert's 'lora_A' is not known"),
        ("model.layers.1.mlp.experts.6.up_proj.weight", (32, 64), "config.json states 6 experts"),
    ],
)
def test_tensors_that_are_not_understood(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    tensors = {**random_tensors(CONFIGS["olmoe"]), name: noise(shape)}
    checkpoint = Checkpoint(write(tmp_path / "m", CONFIGS["olmoe"], tensors))
    with pytest.raises(ReapcError, match=message):
        prune(checkpoint, choice(checkpoint.spec), tmp_path / "out", Silent())
