"""Pruned checkpoints load with no missing and no unexpected key, and hold the source's own bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens
from safetensors.numpy import load_file, save_file

from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.observe import observe
from reapc.observe.scores import Scores
from reapc.progress import Advance, Silent
from reapc.prune.criteria import CRITERIA, check_kept, choose, kept_count
from reapc.prune.rewrite import prune


def tree_digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 12), (0.25, 9), (0.3, 9), (0.5, 6), (1 / 12, 11)])
def test_kept_count(ratio: float, kept: int) -> None:
    assert kept_count(12, ratio) == kept


def test_kept_count_is_not_fooled_by_binary_fractions() -> None:
    assert kept_count(10, 0.3) == 7
    assert kept_count(100, 0.29) == 71


def scores_of(values: list[float], name: str) -> Scores:
    sums = ("routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")
    arrays = {f"layers.0.{n}": np.ones(len(values)) for n in sums} | {f"layers.0.{name}": np.array(values)}
    return Scores({"layers": [0]}, arrays)


@pytest.mark.parametrize(("criterion", "array"), CRITERIA.items())
def test_choice_and_ties(criterion: str, array: str) -> None:
    array = {"reap": "gate_norm_sum", "ean": "norm_sum"}.get(array, array)
    scores = scores_of([3.0, 1.0, 2.0, 2.0, 1.0, 2.0], array)
    assert choose(scores, criterion, 3) == {0: [0, 2, 3]}
    assert choose(scores, criterion, 5) == {0: [0, 1, 2, 3, 5]}


def test_criteria_differ_where_load_differs() -> None:
    scores = scores_of([1.0, 1.0, 1.0], "routed_tokens")
    scores.arrays["layers.0.routed_tokens"] = np.array([10.0, 1.0, 5.0])
    scores.arrays["layers.0.gate_norm_sum"] = np.array([5.0, 2.0, 4.0])
    scores.arrays["layers.0.norm_sum"] = np.array([9.0, 3.0, 8.0])
    assert choose(scores, "reap", 1) == {0: [1]}  # means 0.5, 2, 0.8
    assert choose(scores, "ean", 1) == {0: [1]}
    assert choose(scores, "weighted_sum", 1) == {0: [0]}
    assert choose(scores, "ean_sum", 2) == {0: [0, 2]}
    assert choose(scores, "frequency", 2) == {0: [0, 2]}


def test_fewer_than_top_k_is_refused_with_the_largest_ratio() -> None:
    with pytest.raises(ReapcError, match="top-k of 3") as error:
        check_kept(2, 12, 3)
    assert "0.75" in str(error.value)


@pytest.mark.parametrize("shards", ["50GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_model_equals_hand_made_one(tmp_path: Path, shards: str, dtype: torch.dtype) -> None:
    source = make_model(tmp_path / "m", dtype=dtype, shards=shards)
    before = tree_digest(source)
    checkpoint = Checkpoint(source)
    assert (len(checkpoint.shards) > 1) == (shards == "40KB")
    scores = observe(checkpoint, make_tokens(4, 32), tmp_path / "w", Silent())
    kept = choose(scores, "reap", 9)
    prune(checkpoint, kept, tmp_path / "out", Silent())
    assert tree_digest(source) == before
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept as it is\n"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    keys = [key for key in ("num_experts", "num_local_experts") if key in original]
    assert keys
    assert {key: config[key] for key in keys} == dict.fromkeys(keys, 9)
    assert {k: v for k, v in config.items() if k not in keys} == {k: v for k, v in original.items() if k not in keys}

    model, result = load(source), load(tmp_path / "out")
    for index, experts in kept.items():
        block = model.model.layers[index].mlp
        block.experts.gate_up_proj.data = block.experts.gate_up_proj.data[experts]
        block.experts.down_proj.data = block.experts.down_proj.data[experts]
        block.experts.num_experts = block.gate.num_experts = len(experts)
        block.gate.weight.data = block.gate.weight.data[experts]
    ids = torch.from_numpy(make_tokens(2, 20, seed=5).input_ids.astype(np.int64))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, result(ids).logits)


def test_ratio_zero_is_bit_equal(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny)
    kept = {layer: list(range(12)) for layer in checkpoint.spec.moe_layers}
    prune(checkpoint, kept, tmp_path / "out", Silent())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(load(tiny)(ids).logits, load(tmp_path / "out")(ids).logits)


def test_existing_output_is_untouched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    checkpoint = Checkpoint(tiny)
    with pytest.raises(ReapcError, match="exists already"):
        prune(checkpoint, {layer: list(range(9)) for layer in checkpoint.spec.moe_layers}, tmp_path / "out", Silent())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_no_room_is_refused_before_writing(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("reapc.checkpoint.atomic.free_bytes", lambda path: 1000)
    checkpoint = Checkpoint(tiny)
    with pytest.raises(CannotBeDone, match=r"needs .* of disk, 1000 B are free"):
        prune(checkpoint, {layer: list(range(9)) for layer in checkpoint.spec.moe_layers}, tmp_path / "out", Silent())
    assert not list(tmp_path.iterdir())


class TestBadCheckpoints:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return make_model(tmp_path / "m", shards="40KB")

    def test_truncated_shard(self, model: Path) -> None:
        shard = sorted(model.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(ReapcError, match=rf"{shard.name}.*truncated"):
            Checkpoint(model)

    @pytest.mark.parametrize(
        "junk", [b"", b"\x05", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0notjson!", b"\x02\0\0\0\0\0\0\0[]"]
    )
    def test_corrupt_shard(self, model: Path, junk: bytes) -> None:
        shard = sorted(model.glob("*.safetensors"))[0]
        shard.write_bytes(junk)
        with pytest.raises(ReapcError, match=shard.name):
            Checkpoint(model)

    def test_missing_shard(self, model: Path) -> None:
        shard = sorted(model.glob("*.safetensors"))[0]
        shard.unlink()
        with pytest.raises(ReapcError, match=rf"names the shard '{shard.name}', which is missing"):
            Checkpoint(model)

    @pytest.mark.parametrize("path", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
    def test_shard_outside(self, model: Path, path: str) -> None:
        index = json.loads((model / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = path
        (model / INDEX).write_text(json.dumps(index))
        with pytest.raises(ReapcError, match="outside the checkpoint folder"):
            Checkpoint(model)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, now"),
            (lambda path: path.write_bytes(path.read_bytes()), "it was written to"),
            (lambda path: shutil.copy2(path, path.with_suffix(".new")).replace(path), "another file is in its place"),
            (lambda path: path.unlink(), "it is gone"),
        ],
    )
    def test_shard_that_changes_while_it_is_read(self, model: Path, tmp_path: Path, change: Any, words: str) -> None:
        """When a tensor is read, at the end of a prune (whose copies do not look) and at the end of an observation."""
        checkpoint = Checkpoint(model)
        shard = sorted(model.glob("*.safetensors"))[1]
        name = next(name for name, path in checkpoint.shard_of.items() if path == shard)
        other = next(name for name, path in checkpoint.shard_of.items() if path != shard)
        kept = {layer: list(range(9)) for layer in checkpoint.spec.moe_layers}
        whole = shard.read_bytes()
        checkpoint.tensor(name)
        prune(Checkpoint(model), kept, tmp_path / "before", Silent())
        change(shard)
        with pytest.raises(CannotBeDone, match=rf"{shard.name}: changed while it was read \({'.*' + words}"):
            checkpoint.tensor(name)
        assert checkpoint.tensor(other) is not None
        if shard.is_file():
            with pytest.raises(CannotBeDone, match=rf"{shard.name}: changed while it was read"):
                prune(checkpoint, kept, tmp_path / "out", Silent())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "m"]
        shard.unlink(missing_ok=True)
        shard.write_bytes(whole)
        prune(Checkpoint(model), kept, tmp_path / "out", Silent())

    def test_shard_that_changes_behind_the_last_layer(self, model: Path, tmp_path: Path) -> None:
        class Late(Silent):
            """Touches a shard when the last layer was computed."""

            @contextmanager
            def task(self, name: str, total: float, unit: str) -> Iterator[Advance]:
                yield lambda amount: None
                sorted(model.glob("*.safetensors"))[0].touch()

        with pytest.raises(CannotBeDone, match="changed while it was read"):
            observe(Checkpoint(model), make_tokens(2, 16), tmp_path / "work", Late())
        observe(Checkpoint(model), make_tokens(2, 16), tmp_path / "work", Silent())

    def test_missing_tensor(self, tmp_path: Path) -> None:
        folder = make_model(tmp_path / "one")
        arrays = load_file(folder / "model.safetensors")
        del arrays["model.layers.2.mlp.experts.7.down_proj.weight"]
        save_file(arrays, folder / "model.safetensors")
        with pytest.raises(ReapcError, match=r"experts\.7\.down_proj.*missing"):
            Checkpoint(folder)

    def test_dense_model(self, model: Path) -> None:
        (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 8}))
        with pytest.raises(CannotBeDone, match="no experts to prune"):
            Checkpoint(model)
