"""Healing a quantized GGUF: the view of it by the checkpoint's names, the same rounding as llama-quantize's, the file
that comes out, and a whole build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, make_project, make_tokens, run_main
from gguf.quants import dequantize
from gguf_pruned import convert_all, for_converter, tiny
from numpy.typing import NDArray
from quantized_models import quantized
from test_build import RECIPE as BUILD
from test_heal import lacking

from reapc import healing
from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.passes import Passes
from reapc.progress import Silent
from reapc.prune.heal import Healing, heal
from reapc.prune.refit import Basis
from reapc.quantize.gguf import quantize
from reapc.quantize.gguf_form import DOWN, GgufForm
from reapc.quantize.gguf_view import GgufView
from reapc.quantize.imatrix import write_from_scores
from reapc.stages import StageCache
from reapc.stream.tokens import read_tokens
from reapc.toolchain import find_llamacpp
from reapc.verify.fidelity import compare

tools = find_llamacpp()
pytestmark = pytest.mark.skipif(
    None in (tools.quantize, tools.convert, tools.lib_dir), reason="no llama.cpp: reapc doctor --install"
)
# Plain; rows turned around for RoPE; experts in one tensor, gate and up in turn; latent attention; a recurrent layer.
FAMILIES = ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "llama4", "glm4_moe_lite", "deepseek_v3",
            "qwen3next")  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """Checkpoint, its GGUF in 4 bits and the importance matrix, by family."""
    root = tmp_path_factory.mktemp("families")
    folders = {name: for_converter(name, tiny(name, root / name)) for name in FAMILIES}
    said = convert_all({folder: root / f"{name}.gguf" for name, folder in folders.items()})
    assert set(said.values()) == {"ok"}, said
    found = {}
    for name, folder in folders.items():
        checkpoint = Checkpoint(folder)
        text = make_tokens(8, 16, checkpoint.spec.vocab_size)
        scores = observe(checkpoint, text, root / "work", Silent(), moments=True)
        write_from_scores(root / f"{name}.imatrix", scores, text, checkpoint.spec)
        out = root / f"{name}-q4.gguf"
        quantize(root / f"{name}.gguf", out, "Q4_K_M", root / f"{name}.imatrix")
        found[name] = (folder, out, root / f"{name}.imatrix")
    return found


def sorted_rows(values: NDArray[Any]) -> NDArray[Any]:
    rows = values.reshape(-1, values.shape[-1])
    return rows[np.lexsort(rows.T[::-1])]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_view_is_the_file_by_the_checkpoints_names(name: str, families: Any, tmp_path: Path) -> None:
    """Every expert's matrix equal to the file's; of the others the same rows, in the checkpoint's order."""
    folder, path, imatrix = families[name]
    view, plain = GgufView(folder, path, imatrix, tmp_path), Checkpoint(folder)
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(str(path)).tensors}
    assert view.places
    turned = set()
    for tensor, place in view.places.items():
        parts = [stored[p.name if place.layer is None else f"blk.{place.layer}.{p.name}"] for p in place.group.gguf]
        ours, own = view.tensor(tensor).numpy(), plain.tensor(tensor).float().numpy()
        assert ours.shape == own.shape
        if tensor in view.left:
            assert np.array_equal(ours, own)
            continue
        assert 0 < np.linalg.norm(ours - own) < 0.25 * np.linalg.norm(own), tensor
        if place.group.role == "expert":
            experts = range(len(parts[0])) if place.expert is None else [place.expert]
            for expert in experts:
                mine = ours if place.expert is not None else ours[expert]
                theirs = sorted_rows(np.concatenate([part[expert] for part in parts]))
                assert any(np.array_equal(sorted_rows(m), theirs) for m in (mine, mine.T)), tensor
        elif parts[0].ndim == 2:
            theirs = np.concatenate(parts)
            assert np.array_equal(sorted_rows(ours), sorted_rows(theirs)), tensor
            turned |= set() if np.array_equal(ours, theirs) else {place.group.name}
        else:  # latent attention: (heads, latent, nope) and (heads, values, latent)
            whole = np.concatenate([parts[0].transpose(0, 2, 1), parts[1]], axis=1)
            assert np.array_equal(ours, whole.reshape(ours.shape)), tensor
    assert bool(turned) == (name in ("mixtral", "granitemoe")), turned
    # split between two tensors of several types
    assert {left.split(".")[-2] for left in view.left} == ({"in_proj_qkvz"} if name == "qwen3next" else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_rounded_as_llama_quantize_rounds(name: str, families: Any, tmp_path: Path) -> None:
    """Weights that are not changed give the bytes of the file."""
    folder, path, imatrix = families[name]
    form = GgufForm(folder, path, imatrix, tmp_path)
    none = Basis(*(torch.zeros(0) for _ in range(3)))
    for index in form.source.spec.moe_layers:
        down = form.down(index, tmp_path)
        stored = form.view.stored[f"blk.{index}.{DOWN}"].data
        for expert in range(form.source.spec.num_experts):
            values, blocks = down.rounded(expert, down.weight(expert), none)
            assert np.array_equal(blocks.reshape(-1), stored[expert].view(np.uint8).reshape(-1)), (index, expert)
            torch.testing.assert_close(values, down.weight(expert) + down.made(expert))


RECIPE = BUILD.replace("experts = 9", "experts = 8").replace('"Q4_K_M"', '"Q2_K"\nheal = true').replace("= 16", "= 56")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heal")
    return make_project(
        folder, RECIPE, sequences=60, hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts_per_tok=4
    )


def test_a_build_heals_what_it_quantizes(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    """Smaller KL at the same bytes; nothing but the experts' down projections differs."""
    found = {}
    for name, setting in (("plain", "false"), ("healed", "true")):
        code, _, err = run_main(
            capsys, "build", project / "tiny.toml", "--set", f"quantize.heal={setting}", "--out", tmp_path / name
        )
        assert code == 0, err
        found[name] = json.loads((tmp_path / name / "manifest.json").read_text())
    assert found["plain"]["healing_quantized"] == {}
    healing = found["healed"]["healing_quantized"]
    assert healing["healed"]
    assert healing["after"]["kl"] < healing["before"]["kl"]
    assert [layer["layer"] for layer in healing["layers"]] == [0, 1]
    assert "heal-quantized" in found["healed"]["stage_seconds"]
    assert "quantize" in found["healed"]["reused"]
    assert found["healed"]["fidelity"]["kl"] < found["plain"]["fidelity"]["kl"]
    files = [tmp_path / name / "model.gguf" for name in ("plain", "healed")]
    before, after = ({t.name: t.data for t in gguf.GGUFReader(str(path)).tensors} for path in files)
    assert files[0].stat().st_size == files[1].stat().st_size
    changed = {name for name, data in after.items() if not np.array_equal(data, before[name])}
    assert changed == {f"blk.{index}.{DOWN}" for index in range(2)}
    start = min(int(t.data_offset) for t in gguf.GGUFReader(str(files[0])).tensors)
    assert files[0].read_bytes()[:start] == files[1].read_bytes()[:start]
    # the model without pruning is the reference of its own quantized form
    code, _, err = run_main(
        capsys, "build", project / "tiny.toml", "--set", 'prune.method="none"', "--set", 'prune.experts="auto"',
        "--out", tmp_path / "whole",
    )  # fmt: skip
    assert code == 0, err
    whole = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert whole["experts_kept"] == 12
    assert whole["healing_quantized"]["after"]["kl"] < whole["healing_quantized"]["before"]["kl"]


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8"])
def test_a_source_in_fp8(scheme: str, project: Path, cache: str, capsys, tmp_path: Path) -> None:
    """Read by the converter as it is, or decoded before: what is refitted are the weights that FP8 stands for."""
    quantized(project / "model", tmp_path / "source", scheme)
    shutil.copy(project / "tokens.safetensors", tmp_path)
    (tmp_path / "fp8.toml").write_text((project / "tiny.toml").read_text().replace('"model"', '"source"'))
    code, _, err = run_main(
        capsys, "build", tmp_path / "fp8.toml", "--set", "quantize.heal=true", "--out", tmp_path / "out"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert ("decode" in found["stage_seconds"]) == (scheme == "fp8")
    healing = found["healing_quantized"]
    assert healing["after"]["kl"] < healing["before"]["kl"]
    assert all(layer["kept"] and layer["choice"][1] < layer["choice"][0] for layer in healing["layers"])


def test_a_result_that_healing_made_worse_ships_as_it_was(
    project: Path, cache: str, capsys, tmp_path: Path, monkeypatch, stage_folders: dict[str, Path]
) -> None:
    monkeypatch.setattr(healing, "TOP1_LOSS", -1.0)
    code, _, err = run_main(
        capsys, "build", project / "tiny.toml", "--set", "calibration.sequences=48", "--out", tmp_path / "out"
    )
    assert (code, "the result stays unhealed" in err) == (0, True), err
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["healing_quantized"]["healed"]
    quantized, shipped = (stage_folders[name] / "model.gguf" for name in ("quantize", "heal-quantized"))
    assert quantized.read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "deepseek_v3"])
def test_what_is_lacking_is_what_the_healed_file_still_lacks(name: str, families: Any, tmp_path: Path) -> None:
    """The error that is reported of the first layer with experts is that of the file that was written, read anew."""
    folder, path, imatrix = families[name]
    original = Checkpoint(folder)
    texts = [make_tokens(count, 32, original.spec.vocab_size, seed=count, padded=True) for count in (60, 20)]
    form, out = GgufForm(folder, path, imatrix, tmp_path), tmp_path / "healed" / "q4.gguf"
    first = heal(original, form, *texts, tmp_path / "work", out, Silent())[0]
    assert first.kept
    assert first.choice[1] < first.choice[0]
    for file, expected in ((path, first.choice[0]), (out, first.choice[1])):
        (tmp_path / file.name).mkdir()
        found = lacking(original, GgufView(folder, file, imatrix, tmp_path / file.name), first.layer, texts[1])
        assert found == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_run_goes_on_to_the_same_bytes(families: Any, tmp_path: Path, monkeypatch) -> None:
    folder, path, imatrix = families["qwen3_moe"]
    original = Checkpoint(folder)
    texts = [make_tokens(20, 16, original.spec.vocab_size, seed=seed) for seed in (5, 6)]
    outs = [tmp_path / "whole.gguf", tmp_path / "resumed.gguf"]
    real, seen = Healing._layer, []

    def stopped(self: Healing, index: int) -> object:
        seen.append(index)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(self, index)

    def run(out: Path) -> None:
        form = GgufForm(folder, path, imatrix, tmp_path)
        heal(original, form, *texts, tmp_path / "work", out, Silent())

    run(outs[0])
    with monkeypatch.context() as patched:
        patched.setattr(Healing, "_layer", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(outs[1])
        assert not outs[1].exists()
        run(outs[1])
    assert seen[:3] == [0, 1, 1]
    assert outs[0].read_bytes() == outs[1].read_bytes() != path.read_bytes()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (['quantize.format="BF16"'], 'quantize.heal = true, but quantize.format = "BF16"'),
        (['quantize.method="none"', 'quantize.format="auto"'], 'quantize.heal = true, but quantize.method = "none"'),
        (["calibration.sequences=2"], "healing needs some to fit"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_anything_is_computed(
    settings: list[str], words: str, project: Path, cache: str, capsys, tmp_path: Path
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    code, _, err = run_main(capsys, "build", project / "tiny.toml", *options, "--out", tmp_path / "out")
    assert (code, words in err) == (2, True), err
    assert "observe" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_model_at_two_bits_loses_a_quarter_less(cache: str, tmp_path: Path) -> None:
    """A trained model, text that nothing was fitted to, the real files in llama.cpp."""
    original = Checkpoint(ROOT / "demo" / "model")
    read = lambda name: read_tokens(ROOT / "demo" / f"{name}.safetensors", original.spec.vocab_size)  # noqa: E731
    calibration, held_out = read("calibration"), read("held_out")
    passes = Passes(original, calibration, StageCache(tmp_path / "stages", print), Silent(), pre_tokenizer="qwen2")
    quantized = passes.quantize_gguf(passes.source, "Q2_K")
    healed, _ = passes.heal_quantized(passes.source, quantized, "Q2_K")
    before, after = (compare(original.folder, path, held_out, Silent()) for path in (quantized, healed))
    assert after.kl < 0.75 * before.kl
    assert after.top1 > before.top1
