"""A pruned GGUF holds the source's own bytes and is what converting after a prune gives; llama.cpp runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from conftest import make_tokens, run_main
from gguf_pruned import (
    Contents,
    Kept,
    convert_all,
    copied,
    for_converter,
    real_structure,
    same_metadata,
    same_tensors,
    scores_of,
    split,
    tiny,
)  # fmt: skip
from numpy.typing import NDArray

from reapc.arch.spec import ModelSpec
from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe, router_digest
from reapc.progress import Silent
from reapc.prune.criteria import best_of, choose, groups_of
from reapc.prune.gguf import GgufSource, prune_gguf
from reapc.prune.rewrite import Mtp, prune
from reapc.quantize.gguf import quantize
from reapc.toolchain import find_llamacpp
from reapc.verify.gguf_logits import gguf_log_probs

tools = find_llamacpp()
pytestmark = pytest.mark.skipif(
    None in (tools.quantize, tools.convert, tools.lib_dir), reason="no llama.cpp: reapc doctor --install"
)
FAMILIES = (
    "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "glm4_moe", "minimax_m2", "mixtral", "phimoe", "olmoe", "ernie4_5_moe",
    "granitemoe", "gpt_oss", "llama4", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k25", "glm4_moe_lite",
    "glm_moe_dsa", "qwen3next", "qwen35moe", "kimi-linear", "nemotron_h_moe", "gemma4", "step3p7", "mimo_v2_flash",
    "deepseek_v4", "minimax_m3",
)  # fmt: skip
SERVED = {"qwen3": "qwen3-30b-a3b", "glm": "glm-4.5-air", "gpt-oss": "gpt-oss-20b", "deepseek": "deepseek-v3",
          "mimo_v2_flash": "mimo-v2-flash"}  # fmt: skip
# What the converter makes of the folder's name, and a list of DeepSeek-V4's that it copies from config.json whole.
OTHER = {"general.name", "general.size_label", "general.finetune", "general.version", "general.basename",
         "deepseek4.attention.compress_ratios"}  # fmt: skip


class Made(NamedTuple):
    """A checkpoint, its GGUF, what is kept of it, and the GGUFs of what was pruned first, by what became of MTP."""

    folder: Path
    spec: ModelSpec
    whole: Path
    kept: Kept
    values: dict[int, NDArray[Any]]
    converted: dict[str, Path]
    said: dict[Path, str]

    def pruned(self, out: Path, source: Path | None = None, mtp: Mtp = "drop") -> Path:
        prune_gguf(GgufSource(source or self.whole), self.kept, out, Silent(), mtp=mtp, values=self.values)
        return out


def made_of(name: str, folder: Path, count: int, root: Path, ways: tuple[Mtp, ...] = ("drop", "prune")) -> Made:
    """Everything but the conversions."""
    checkpoint = Checkpoint(folder, as_stored=True)
    spec, random = checkpoint.spec, np.random.default_rng(0)
    values = {layer: random.random(spec.num_experts) for layer in spec.moe_layers}
    kept = {layer: best_of(row, count, groups_of(spec)) for layer, row in values.items()}
    converted = {}
    for mtp in ways if spec.mtp_layers else ways[:1]:
        out = root / mtp / folder.name
        prune(checkpoint, kept, out, Silent(), mtp=mtp, values=values)
        converted[mtp] = for_converter(name, out).with_name(f"{folder.name}.gguf")
    whole = for_converter(name, copied(folder, root / "whole" / folder.name)).with_name(f"{folder.name}.gguf")
    return Made(folder, spec, whole, kept, values, converted, {})


def converted(made: dict[str, Made]) -> dict[str, Made]:
    """All of them, with what the converter said of each."""
    said = convert_all({p.with_suffix(""): p for m in made.values() for p in (m.whole, *m.converted.values())})
    return {name: m._replace(said=said) for name, m in made.items()}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root, made = tmp_path_factory.mktemp("families"), {}
    for name in FAMILIES:
        folder = tiny(name, root / name.replace(" ", "_"))
        spec = Checkpoint(folder).spec
        count = max(spec.top_k + 1, spec.num_experts * 2 // 3)
        made[name] = made_of(name, folder, count - count % spec.n_group, root)
    return converted(made)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root, made = tmp_path_factory.mktemp("served"), {}
    for name, text in SERVED.items():
        spec = real_structure(text, root / name)
        made[name] = made_of(name, root / name, spec.num_experts // 2, root, ("drop",))
    return converted(made)


def log_probs(path: Path) -> NDArray[np.float32]:
    ids = np.random.default_rng(1).integers(3, 2000, (2, 48), dtype=np.int32)
    found = np.stack(list(gguf_log_probs(path, ids, threads=2)))
    assert np.isfinite(found).all()
    return found


def kl(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Mean KL(a || b) in nats."""
    return float((np.exp(a) * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_converting_then_pruning_is_pruning_then_converting(
    name: str, families: dict[str, Made], tmp_path: Path
) -> None:
    made = families[name]
    source = GgufSource(made.whole)
    assert made.said[made.whole.with_suffix("")] == "ok"
    assert source.router_digest == router_digest(Checkpoint(made.folder))
    assert source.spec.moe_layers == made.spec.moe_layers
    before = made.whole.read_bytes()
    whole, arch, layers = Contents(made.whole), source.arch, made.spec.num_layers
    for mtp, reference in made.converted.items():
        found = Contents(made.pruned(tmp_path / f"{mtp}.gguf", mtp=mtp))  # type: ignore[arg-type]
        expected = Contents(reference)
        same_tensors(found.tensors, expected.tensors)
        assert found.shapes == expected.shapes
        lists = {key: value for key, (_, _, value) in whole.fields.items() if key.startswith(f"{arch}.")}
        changed = {f"{arch}.expert_count": len(made.kept[made.spec.moe_layers[0]])}
        if mtp == "drop" and source.spec.mtp_layers:
            changed |= {f"{arch}.block_count": layers, f"{arch}.nextn_predict_layers": 0}
            blocks = layers + len(source.spec.mtp_layers)
            changed |= {k: v[:layers] for k, v in lists.items() if isinstance(v, list) and len(v) == blocks}
        same_metadata(found, whole, changed)
        if (name, mtp) == ("mimo_v2_flash", "drop"):
            continue  # the converter announces three MTP layers, whether there are any or not
        ours, theirs = ({k: f[:2] for k, f in c.fields.items() if f[2] != 0} for c in (found, expected))
        assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} <= OTHER
    assert made.whole.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "ftype", "bound"),
    [
        ("qwen3", "Q8_0", 0.002), ("qwen3", "Q4_K_M", 0.1), ("qwen3", "IQ4_XS", 0.1), ("qwen3", "Q3_K_S", 0.3),
        ("glm", "Q4_K_M", 0.2), ("deepseek", "Q4_K_S", 0.4), ("mimo_v2_flash", "Q5_0", 0.1), ("gpt-oss", "", 1e-9),
    ],
)  # fmt: skip
def test_quantized_files_keep_their_blocks_and_are_run(
    name: str, ftype: str, bound: float, served: dict[str, Made], tmp_path: Path
) -> None:
    made = served[name]
    source, plain = made.whole, made.pruned(tmp_path / "plain.gguf")
    if ftype:
        source = tmp_path / "quantized.gguf"
        quantize(made.whole, source, ftype, threads=2)
    found, whole = Contents(made.pruned(tmp_path / "pruned.gguf", source)), Contents(source)
    same_tensors(found.tensors, whole.cut(made.kept, made.spec.num_layers))
    kinds = {kind for key, (kind, _) in found.tensors.items() if "_exps.weight" in key}
    assert kinds & {"MXFP4", "Q8_0", "Q4_K", "IQ4_XS", "Q3_K", "Q5_0", "Q5_1"}
    if ftype and not GgufSource(source).spec.mtp_layers:  # types follow the number of layers, which MTP layers count in
        quantize(plain, tmp_path / "again.gguf", ftype, threads=2)
        same_tensors(found.tensors, Contents(tmp_path / "again.gguf").tensors)
    expected = log_probs(made.converted["drop"])
    assert expected.std() > 0.5
    assert kl(expected, log_probs(tmp_path / "pruned.gguf")) < bound
    if ftype == "Q8_0":  # what the bound is worth: routers of other experts
        reader = gguf.GGUFReader(tmp_path / "pruned.gguf", "r+")
        for tensor in reader.tensors:
            if tensor.name.endswith("ffn_gate_inp.weight"):
                tensor.data[:] = np.roll(tensor.data, 1, axis=0)
        del reader
        assert kl(expected, log_probs(tmp_path / "pruned.gguf")) > 20 * bound


@pytest.mark.parametrize("mtp", ["drop", "prune"])
def test_mtp_layers_in_or_out_the_model_computes_the_same(mtp: Mtp, served: dict[str, Made], tmp_path: Path) -> None:
    for name in ("glm", "mimo_v2_flash"):
        made = served[name]
        out = made.pruned(tmp_path / f"{name}.gguf", mtp=mtp)
        assert bool(GgufSource(out).spec.mtp_layers) == (mtp == "prune")
        np.testing.assert_array_equal(log_probs(out), log_probs(made.converted["drop"]))


def test_split_files(served: dict[str, Made], tmp_path: Path) -> None:
    made = served["glm"]
    first = split(made.whole, tmp_path, 30)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) == 3
    expected = Contents(made.pruned(tmp_path / "expected.gguf"))
    for source in parts[0], parts[2]:
        one = Contents(made.pruned(tmp_path / f"{source.stem}.one.gguf", source))
        same_tensors(one.tensors, expected.tensors)
        assert {key: field[2] for key, field in one.fields.items()} == {k: f[2] for k, f in expected.fields.items()}
    made.pruned(tmp_path / "cut-00001-of-00003.gguf", first)
    written = sorted(tmp_path.glob("cut-*"))
    assert [path.name for path in written] == [f"cut-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    same_tensors({k: v for path in written for k, v in Contents(path).tensors.items()}, expected.tensors)
    np.testing.assert_array_equal(log_probs(written[0]), log_probs(tmp_path / "expected.gguf"))
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(Exception, match=r"(?s)has 3 parts.*NAME-00001-of-00003.gguf"):
        made.pruned(tmp_path / "cut-00001-of-00004.gguf", first)
    with pytest.raises(Exception, match=r"(?s)has 1 part\b.*llama-gguf-split"):
        made.pruned(tmp_path / "cut-00001-of-00004.gguf")


@pytest.mark.parametrize("dissolve", [False, True])
def test_groups_are_kept_or_given_up(
    dissolve: bool, served: dict[str, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = served["deepseek"], tmp_path / "out.gguf"
    count, arch = made.spec.num_experts // 2, "deepseek2"
    assert made.spec.n_group > made.spec.topk_group
    scores = scores_of(made.spec, router_digest(Checkpoint(made.folder)))
    scores.save(tmp_path / "scores.st")
    options = ["--scores", tmp_path / "scores.st", "--experts", count, *(["--dissolve-groups"] if dissolve else [])]
    code, _, err = run_main(capsys, "prune", made.whole, *options, "--out", out)
    assert code == 0, err
    assert ("groups are given up" in err) == dissolve
    kept = choose(scores, "reap", count, 1 if dissolve else made.spec.n_group)
    found, whole = Contents(out), Contents(made.whole)
    same_tensors(found.tensors, whole.cut(kept, made.spec.num_layers))
    groups = {f"{arch}.expert_group_count": 1, f"{arch}.expert_group_used_count": 1} if dissolve else {}
    same_metadata(found, whole, {f"{arch}.expert_count": count, **groups})
    log_probs(out)
    options[3] = count + 1
    code, _, err = run_main(capsys, "prune", made.whole, *options, "--out", tmp_path / "x.gguf")
    assert (code, "do not fill the router's" in err) == ((0, False) if dissolve else (2, True)), err


def test_scores_of_the_checkpoint_prune_its_gguf(
    served: dict[str, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, scores = served["qwen3"], tmp_path / "scores.st"
    experts = made.spec.num_experts
    observed = observe(Checkpoint(made.folder), make_tokens(2, 24, 2000), tmp_path / "work", Silent())
    observed.save(scores)
    out, arguments = tmp_path / "out.gguf", ["--scores", scores, "--ratio", 0.25, "--criterion", "ean", "--json"]
    code, printed, err = run_main(capsys, "prune", made.whole, *arguments, "--out", out)
    assert code == 0, err
    told, kept = json.loads(printed), choose(observed, "ean", experts - experts // 4)
    dropped = {str(layer): sorted(set(range(experts)) - set(stay)) for layer, stay in kept.items()}
    size = out.stat().st_size
    assert told == {"output": str(out), "experts_kept": experts - experts // 4, "bytes": size, "dropped": dropped}
    same_tensors(Contents(out).tensors, Contents(made.whole).cut(kept, made.spec.num_layers))

    code, _, err = run_main(capsys, "prune", made.whole, *arguments, "--out", out)
    assert (code, "exists already" in err, out.stat().st_size) == (2, True, size)
    code, _, err = run_main(capsys, "prune", served["glm"].whole, *arguments, "--out", tmp_path / "x.gguf")
    assert (code, "experts, top-" in err) == (2, True), err

    other = tmp_path / "other.gguf"  # another revision: one weight of one router
    shutil.copy(made.whole, other)
    reader = gguf.GGUFReader(other, "r+")
    router = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_gate_inp.weight")
    router.data[3, 5] += 1e-6
    del reader, router
    code, _, err = run_main(capsys, "prune", other, *arguments, "--out", tmp_path / "x.gguf")
    assert (code, "another model or revision" in err) == (2, True), err
    del observed.header["router_digest"]
    observed.save(scores)
    code, _, err = run_main(capsys, "prune", made.whole, *arguments, "--out", tmp_path / "x.gguf")
    assert (code, "earlier version of reapc" in err) == (2, True), err
    assert not list(tmp_path.glob("x.*"))
