"""Pruning of GGUF files made by hand: metadata of every type, both byte orders, and everything that is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import make_model, run_main
from gguf_pruned import Contents, same_metadata, same_tensors, scores_of

from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Silent
from reapc.prune import gguf as module
from reapc.prune.gguf import GgufSource, prune_gguf

EXPERTS, HIDDEN = 6, 32
TYPES = gguf.GGUFValueType
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
KEPT = {1: [0, 2, 3, 5], 2: [1, 2, 4, 5]}
Tensors = dict[str, tuple[np.ndarray, Any]]


def tensors_of(layers: int = 3, experts: int = EXPERTS) -> Tensors:
    """A dense layer and MoE layers."""
    random = np.random.default_rng(0)

    def floats(*shape: int) -> tuple[np.ndarray, Any]:
        return random.standard_normal(shape).astype(np.float32), F32

    def blocks(*shape: int) -> tuple[np.ndarray, Any]:
        return random.integers(0, 256, (*shape, HIDDEN // 32 * 34), np.uint8), Q8_0

    found = {"token_embd.weight": blocks(64), "blk.0.ffn_up.weight": blocks(experts), "output_norm.weight": floats(3)}
    for layer in range(1, layers):
        for part in ("gate", "up", "down"):
            found[f"blk.{layer}.ffn_{part}_exps.weight"] = blocks(experts, 8)
            found[f"blk.{layer}.ffn_{part}_exps.scale"] = floats(experts)
        found[f"blk.{layer}.ffn_down_exps.bias"] = floats(experts, 7)
        found[f"blk.{layer}.ffn_gate_inp.weight"] = floats(experts, HIDDEN)
        found[f"blk.{layer}.exp_probs_b.bias"] = floats(1, experts)
        found[f"blk.{layer}.attn_q_norm.weight"] = floats(experts)  # as many as experts, and none of theirs
        found[f"blk.{layer}.ffn_up_shexp.weight"] = blocks(experts)
    return found


def write(path: Path, arch: str = "qwen3moe", tensors: Tensors | None = None, **options: Any) -> Path:
    """A small file; ``options``: metadata that are other than usual, None for those that are left out."""
    writer = gguf.GGUFWriter(path, arch, endianess=options.pop("endian", gguf.GGUFEndian.LITTLE))
    if "alignment" in options:
        writer.add_custom_alignment(options.pop("alignment"))
    numbers = {
        "block_count": 3, "expert_count": EXPERTS, "expert_used_count": 2, "context_length": 64,
        "embedding_length": HIDDEN, "attention.head_count": 2, "attention.head_count_kv": 1,
    }  # fmt: skip
    for key, value in {**numbers, **options}.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    for number, kind in enumerate(TYPES):
        if kind not in (TYPES.STRING, TYPES.ARRAY):
            value = {TYPES.BOOL: True, TYPES.FLOAT32: 0.1, TYPES.FLOAT64: 0.1}.get(kind, 100 + number)
            writer.add_key_value(f"some.{kind.name}", value, kind)
            writer.add_key_value(f"some.list.{kind.name}", [value, value], TYPES.ARRAY, sub_type=kind)
    writer.add_uint16("split.count", 0)  # as llama-gguf-split leaves it where it joins parts
    writer.add_string("some.text", "ä\n\0b")
    writer.add_key_value("some.texts", ["", "a", "ö"], TYPES.ARRAY, sub_type=TYPES.STRING)
    writer.add_token_list([f"word {i}" for i in range(5000)])
    for name, (data, kind) in (tensors or tensors_of()).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endian", list(gguf.GGUFEndian))
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_all_but_the_experts_stays_to_the_byte(tmp_path: Path, endian: gguf.GGUFEndian, alignment: int) -> None:
    path = write(tmp_path / "m.gguf", endian=endian, alignment=alignment)
    source, out = GgufSource(path), tmp_path / "new" / "out.gguf"
    written = prune_gguf(source, KEPT, out, Silent())
    assert written == out.stat().st_size
    found, whole = Contents(out), Contents(path)
    assert found.alignment == alignment
    same_tensors(found.tensors, whole.cut(KEPT, 3))
    same_metadata(found, whole, {"qwen3moe.expert_count": 4})
    assert found.tensors["blk.1.exp_probs_b.bias"][1].shape == (1, 4)
    assert found.tensors["blk.1.attn_q_norm.weight"][1].shape == (EXPERTS,)
    little = write(tmp_path / "little.gguf")
    assert source.router_digest == GgufSource(little).router_digest
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.gguf"]


def test_all_experts_kept_is_the_same_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    prune_gguf(GgufSource(path), everywhere(list(range(EXPERTS))), tmp_path / "out.gguf", Silent())
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def everywhere(experts: list[int]) -> dict[int, list[int]]:
    return {layer: experts for layer in KEPT}


def with_mtp(path: Path, **options: Any) -> Path:
    return write(path, tensors=tensors_of(4), block_count=4, nextn_predict_layers=1, **options)


def test_lists_of_layers_lose_what_mtp_layers_have(tmp_path: Path) -> None:
    lists = {"attention.head_count_kv": [1, 2, 3, 4], "rope.dimension_sections": [1, 1, 2, 0], "other": [1, 2, 3]}
    source = GgufSource(with_mtp(tmp_path / "m.gguf", **lists))
    assert len(source.spec.mtp_layers) == 1
    prune_gguf(source, KEPT, tmp_path / "out.gguf", Silent())
    found, whole = Contents(tmp_path / "out.gguf"), Contents(tmp_path / "m.gguf")
    counts = {"expert_count": 4, "block_count": 3, "nextn_predict_layers": 0, "attention.head_count_kv": [1, 2, 3]}
    same_metadata(found, whole, {f"qwen3moe.{key}": value for key, value in counts.items()})
    same_tensors(found.tensors, whole.cut(KEPT, 3))

    prune_gguf(source, KEPT, tmp_path / "kept.gguf", Silent(), mtp="prune")
    norms = np.linalg.norm(source.router(3).astype(np.float64), axis=1)
    best = {3: sorted(np.argsort(-norms)[:4].tolist())}
    found = Contents(tmp_path / "kept.gguf")
    same_tensors(found.tensors, whole.cut(KEPT | best, 4))
    same_metadata(found, whole, {"qwen3moe.expert_count": 4})

    source = GgufSource(with_mtp(tmp_path / "odd.gguf", strange=[1, 2, 3, 4]))
    with pytest.raises(CannotBeDone, match=r"(?s)qwen3moe.strange has 4 values.*--mtp prune"):
        prune_gguf(source, KEPT, tmp_path / "x.gguf", Silent())
    prune_gguf(source, KEPT, tmp_path / "x.gguf", Silent(), mtp="prune")


def tables() -> Tensors:
    table = np.array([[0, 1], [1, 4], [5, 3], [2, 0]], np.int32)
    return tensors_of() | {"blk.1.ffn_gate_tid2eid.weight": (table, gguf.GGMLQuantizationType.I32)}


@pytest.mark.parametrize("endian", list(gguf.GGUFEndian))
def test_tables_of_experts_are_written_in_the_new_numbers(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    source = GgufSource(write(tmp_path / "m.gguf", tensors=tables(), endian=endian))
    with pytest.raises(ReapcError, match=r"ffn_gate_tid2eid.weight: which experts(?s:.*)prune with scores"):
        prune_gguf(source, KEPT, tmp_path / "out.gguf", Silent())
    values = {layer: np.array([1.0, 9, 2, 4, 9, 3]) for layer in KEPT}
    prune_gguf(source, KEPT, tmp_path / "out.gguf", Silent(), values=values)
    found = Contents(tmp_path / "out.gguf").tensors["blk.1.ffn_gate_tid2eid.weight"][1]
    # 0, 2, 3, 5 become 0, 1, 2, 3; the best that is left is 3, then 5
    assert found.tolist() == [[0, 2], [2, 3], [3, 2], [1, 0]]


def changed(name: str, shape: tuple[int, ...], kind: Any = F32, dtype: Any = np.float32) -> Callable[[Path], Path]:
    return lambda path: write(path, tensors=tensors_of() | {name: (np.ones(shape, dtype), kind)})


def lacks_router(path: Path) -> Path:
    return write(path, tensors={k: v for k, v in tensors_of().items() if k != "blk.2.ffn_gate_inp.weight"})


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda path: write(path, expert_count=None), 1, "no experts to prune: a dense model"),
        (lambda path: write(path, expert_count=8), 2, "has 6 experts, and qwen3moe.expert_count = 8"),
        (lambda path: write(path, "clip"), 2, "no language model"),
        (lambda path: write(path, nextn_predict_layers=2), 2, "expert_count = 6, and no layer has experts"),
        (lacks_router, 2, "layer 2 has experts, and no blk.2.ffn_gate_inp.weight"),
        (changed("blk.1.ffn_gate_inp.weight", (5, HIDDEN)), 2, "shape [5, 32]: 6 experts (qwen3moe.expert_count) on"),
        (changed("blk.1.exp_probs_b.bias", (2, EXPERTS)), 2, "shape [2, 6]: 6 experts"),
        (changed("blk.1.ffn_norm_of_exp.weight", (EXPERTS,)), 1, "is not one that is known here"),
        (changed("blk.1.ffn_gate_tid2eid.weight", (4, 2)), 1, "is F32 [4, 2]: I32 expected"),
        (changed("blk.1.ffn_gate_inp.weight", (EXPERTS, 34), Q8_0, np.uint8), 1, "ffn_gate_inp.weight is Q8_0"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_pruned(
    make: Callable[[Path], Path], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = GgufSource(write(tmp_path / "good.gguf"))
    scores_of(good.spec, good.router_digest).save(tmp_path / "scores.st")
    make(tmp_path / "bad.gguf")
    arguments = ["--scores", tmp_path / "scores.st", "--experts", 4, "--out", tmp_path / "out.gguf"]
    found, _, err = run_main(capsys, "prune", tmp_path / "bad.gguf", *arguments)
    assert (found, words in err) == (code, True), err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("size", [0, 3, 30, 5000, 80_000, -40])
def test_a_truncated_file(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    arguments = ["--scores", tmp_path / "none.st", "--experts", 4, "--out", tmp_path / "out.gguf"]
    code, _, err = run_main(capsys, "prune", tmp_path / "cut.gguf", *arguments)
    assert code == 2
    assert "cut short" in err or "not a readable GGUF" in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--experts", 1], 2, "fewer than the top-k of 2"), (["--experts", 7], 2, "7 experts asked for"),
        (["--ratio", 0.9], 2, "a ratio of at most 0.6667"), ([], 2, "one of --ratio and --experts"),
        (["--experts", 4, "--out", "out"], 2, "ends in .gguf"), (["--experts", 4, "--scores", "no.st"], 2, "no.st"),
        (["--experts", 4, "--out", "out-00001-of-00002.gguf"], 2, "has 1 part\n"),
        (["--experts", 4, "--out", "m.gguf"], 2, "exists already"),
    ],
)  # fmt: skip
def test_requests_that_are_wrong(
    options: list[Any], code: int, words: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = GgufSource(write(tmp_path / "m.gguf"))
    before = source.path.read_bytes()
    scores_of(source.spec, source.router_digest).save(tmp_path / "scores.st")
    found, _, err = run_main(capsys, "prune", "m.gguf", "--scores", "scores.st", "--out", "out.gguf", *options)
    assert (found, words in err) == (code, True), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "scores.st"]
    assert source.path.read_bytes() == before


def test_groups_and_counts_that_llama_cpp_cannot_hold(tmp_path: Path) -> None:
    groups = {"expert_group_count": 2, "expert_group_used_count": 1}
    source, out = GgufSource(write(tmp_path / "m.gguf", **groups)), tmp_path / "out.gguf"
    prune_gguf(source, KEPT, tmp_path / "fits.gguf", Silent())
    with pytest.raises(ReapcError, match="5 experts do not fill the router's 2 groups equally"):
        prune_gguf(source, everywhere([0, 1, 2, 3, 4]), out, Silent())
    with pytest.raises(ReapcError, match=r"the experts kept are \[3, 1\] of the router's 2 groups"):
        prune_gguf(source, everywhere([0, 1, 2, 5]), out, Silent())
    with pytest.raises(ReapcError, match="layer 0 of this qwen3moe model has no experts"):
        prune_gguf(source, {0: [0, 1, 2, 3], **KEPT}, out, Silent())
    with pytest.raises(ReapcError, match="which experts of layer 2 are kept is not said"):
        prune_gguf(source, {1: [0, 1, 2, 3]}, out, Silent())
    one = GgufSource(write(tmp_path / "one.gguf", expert_used_count=1, expert_group_count=1))
    with pytest.raises(CannotBeDone, match=r"1 experts: llama.cpp stops .* no more experts than groups \(1\)"):
        prune_gguf(one, everywhere([2]), out, Silent())
    maverick = write(tmp_path / "m4.gguf", "llama4", tensors_of(experts=128), expert_count=128, expert_used_count=1)
    with pytest.raises(CannotBeDone, match="tells by 128 experts that a Llama-4 model does not normalize"):
        prune_gguf(GgufSource(maverick), everywhere(list(range(64))), out, Silent())
    assert not list(tmp_path.glob("out*"))


def test_no_room_and_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = GgufSource(write(tmp_path / "m.gguf")), tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr("reapc.checkpoint.atomic.free_bytes", lambda path: 1000)
        with pytest.raises(CannotBeDone, match=r"the pruned GGUF needs .* of disk, 1000 B are free"):
            prune_gguf(source, KEPT, out, Silent())
    original = module.write_gguf

    def disturbed(*arguments: Any) -> int:
        source.path.write_bytes(source.path.read_bytes())
        return original(*arguments)

    monkeypatch.setattr(module, "write_gguf", disturbed)
    with pytest.raises(ReapcError, match="was changed while it was read"):
        prune_gguf(source, KEPT, out, Silent())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_a_gguf_is_no_model_to_observe_or_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf")
    np.save(tmp_path / "t.npy", np.zeros((1, 4), np.int32))
    code, _, err = run_main(capsys, "observe", path, "--tokens", tmp_path / "t.npy", "--out", tmp_path / "s.st")
    assert (code, "made of: `reapc prune FILE.gguf` takes the scores" in err) == (2, True), err
    (tmp_path / "r.toml").write_text(f'[model]\nsource = "{path}"\n[target]\nvram = "24GB"\n')
    code, _, err = run_main(capsys, "build", tmp_path / "r.toml", "--out", tmp_path / "b")
    assert (code, "made of: `reapc prune FILE.gguf` takes the scores" in err) == (2, True), err


def test_scores_are_asked_for_the_very_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = GgufSource(write(tmp_path / "m.gguf"))
    scores = scores_of(source.spec, source.router_digest)
    for key, value in (("top_k", 3), ("num_experts", 8), ("layers", [2])):
        old, scores.header[key] = scores.header[key], value
        scores.save(tmp_path / "s.st")
        scores.header[key] = old
        arguments = ["--scores", tmp_path / "s.st", "--experts", 4, "--out", tmp_path / "out.gguf"]
        code, _, err = run_main(capsys, "prune", source.path, *arguments)
        assert (code, "scores of made up with" in err) == (2, True), err
    code, _, err = run_main(capsys, "prune", make_model(tmp_path / "folder"), *arguments)
    assert code == 2
