"""Rehearsals: every catalogue model shrinks to the same structure, its checkpoint opens, and a recipe runs through."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_main
from safetensors.torch import load_file, save_file

from reapc.arch import known, load_config, model_spec
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.formats.layout import tensors_of
from reapc.rehearse import keys
from reapc.rehearse.checkpoint import write_checkpoint
from reapc.rehearse.shrink import Vocabulary, compare, experts_of, shrink, small
from reapc.rehearse.tokenizer import write_tokenizer

VOCABULARY = Vocabulary(2048, 0, 2, 0)
ONE_PER_FAMILY = list({(s.family, s.model_type, bool(s.mtp_layers)): name for name in reversed(known.names())
                       for s in [known.spec(name)]}.values())  # fmt: skip
QWEN = '[model]\nsource = "Qwen/Qwen3-30B-A3B"\n[target]\nname = "rtx3090x1"\n[serve]\ncontext = 32768\n'


def kept_of(name: str, ratio: float) -> int:
    spec = known.spec(name)
    kept = max(spec.top_k, int(spec.num_experts * ratio))
    return kept - kept % spec.n_group


@pytest.mark.parametrize("name", known.names())
def test_every_catalogue_model_shrinks_to_the_same_structure(name: str) -> None:
    real, kept = known.spec(name), kept_of(name, 0.8)
    tiny = shrink(known.config(name), name, kept, VOCABULARY)
    spec = tiny.spec
    assert 2 * (spec.parameters + spec.mtp_parameters + spec.vision_parameters) < 60e6
    assert compare(real, spec, tiny.layers) == []
    assert {real.layers[i].kind for i in tiny.layers} == {layer.kind for layer in real.layers}
    assert list(tiny.layers) == sorted(tiny.layers)
    assert bool(spec.mtp_layers) == bool(real.mtp_layers)
    assert (spec.top_k > 1) == (real.top_k > 1)
    assert spec.top_k <= tiny.experts_kept < spec.num_experts
    assert tiny.experts_kept % spec.n_group == 0
    # of 8 groups only a few counts divide
    assert abs(tiny.experts_kept / spec.num_experts - kept / real.num_experts) < (0.03 if spec.n_group == 1 else 0.06)
    assert spec.vocab_size == VOCABULARY.size
    assert (spec.vision_parameters > 0) <= (real.vision_parameters > 0)
    assert shrink(known.config(name), name, None, VOCABULARY).experts_kept >= spec.top_k


def test_widths_keep_what_block_sizes_divide() -> None:
    assert [small(n, 256) for n in (7168, 1408, 2880, 704, 96)] == [256, 384, 320, 320, 96]


@pytest.mark.parametrize("kept", [203, 128, 256])
def test_experts_are_near_the_plans_ratio_and_not_mixtral(kept: int) -> None:
    count, few, top_k = experts_of(known.spec("zai-org/GLM-5"), kept, 3)
    assert top_k == keys.LARGEST_TOP_K
    assert few != keys.MIXTRAL
    assert abs(few / count - kept / 256) < 0.02
    assert keys.EXPERTS <= count <= keys.EXPERTS + keys.SPREAD


def test_another_structure_is_refused_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "COUNTS", {**keys.COUNTS, "n_shared_experts": 0})
    with pytest.raises(CannotBeDone) as error:
        shrink(known.config("zai-org/GLM-4.5-Air"), "GLM-4.5-Air", None, VOCABULARY)
    assert "shared_experts: 1 became 0" in str(error.value)
    assert "another structure" in str(error.value)


def test_compare_sees_a_lost_kind_of_layer() -> None:
    real = known.spec("Qwen/Qwen3-Next-80B-A3B-Instruct")
    config = deepcopy(known.config("Qwen/Qwen3-Next-80B-A3B-Instruct"))
    config["num_hidden_layers"] = 2
    assert "a kind of layer is missing" in compare(real, model_spec(config), (0, 1))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_checkpoint_of_each_family_opens(name: str, tmp_path: Path) -> None:
    config = known.config(name)
    vocabulary = write_tokenizer(tmp_path, config["model_type"])
    tiny = shrink(config, name, None, vocabulary)
    written = write_checkpoint(tiny, tmp_path, towers=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.quantization is not None) == (tiny.spec.quantization is not None)
    tensors = [tensor for tensor, _ in tensors_of(checkpoint.spec, mtp=True)]
    assert written.tensors == len(tensors)
    for tensor in tensors[:: max(1, len(tensors) // 20)]:
        assert tuple(checkpoint.tensor(tensor.name).shape) == tensor.shape
    for key in ("bos_token_id", "eos_token_id"):
        for part in (checkpoint.config, checkpoint.config.get("text_config", {})):
            value = part.get(key, 0)
            assert all(0 <= token < vocabulary.size for token in (value if isinstance(value, list) else [value]))


def test_fp8_source_is_written_as_published(tmp_path: Path) -> None:
    name = "Qwen/Qwen3-30B-A3B-FP8"
    tiny = shrink(known.config(name), name, None, write_tokenizer(tmp_path, "qwen3_moe"))
    write_checkpoint(tiny, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv" in index
    published = known.config(name)["quantization_config"]
    ours = load_config(tmp_path)["quantization_config"]
    assert {**ours, "modules_to_not_convert": 0} == {**published, "modules_to_not_convert": 0}


def test_the_same_numbers_each_time(tmp_path: Path) -> None:
    name = "allenai/OLMoE-1B-7B-0924"
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_checkpoint(shrink(known.config(name), name, None, VOCABULARY), folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_vision_tower_is_written_where_transformers_knows_it(tmp_path: Path) -> None:
    name = "Qwen/Qwen3-VL-30B-A3B-Instruct"
    tiny = shrink(known.config(name), name, None, write_tokenizer(tmp_path, "qwen3_vl_moe"))
    written = write_checkpoint(tiny, tmp_path)
    assert written.vision > 0
    assert "model.visual.patch_embed.proj.weight" in Checkpoint(tmp_path).entries


def test_tokenizer_is_trained_where_there_is_no_demo(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary = write_tokenizer(tmp_path, "glm4_moe", demo=tmp_path / "nowhere")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == vocabulary.eos
    assert "<sop>" in tokenizer.get_added_vocab()
    text = "def f(x):\n    return x ** 2  # €\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) <= vocabulary.size


class TestCommand:
    def test_a_recipe_runs_through_to_an_answer(self, cache: str, capsys, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text(QWEN + "[prune]\nratio = 0.2\n[verify]\nmax_kl = 1e-9\n")
        keep = tmp_path / "keep"
        code, out, err = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--keep", keep, "--json")
        assert code == 0, out + err
        report = json.loads(out.strip().splitlines()[-1])
        assert report["ok"]
        steps = {step["name"]: step for step in report["steps"]}
        assert {step["state"] for step in report["steps"]} == {"ok"}
        assert "8 tokens answered, stopped cleanly" in steps["serve"]["seen"]
        assert "as predicted" in steps["emit"]["seen"]
        notes = "\n".join(report["notes"])
        assert f"llama.cpp, {report['format']}, {report['experts_kept']} of 128 experts" in notes
        assert "[verify] are not applied" in notes
        manifest = json.loads((keep / "out" / "manifest.json").read_text())
        assert manifest["format"] == report["format"]
        assert manifest["experts_kept"] / 16 == pytest.approx(report["experts_kept"] / 128, abs=0.2)
        assert json.loads((keep / "rehearsal.json").read_text()) == report
        assert not list(Path(cache, "reapc").glob("stages/quantize-*rehearse*"))

        code, _, err = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--keep", keep)
        assert code == 2
        assert "holds something" in err

    def test_a_recipe_that_cannot_be_planned(self, capsys, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text(QWEN)
        code, out, err = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--set", 'target.vram="1GB"')
        assert code == 1
        assert "error:" in err
        assert "shrink" not in out + err

    def test_a_step_that_fails_is_shown_with_its_words(self, cache, capsys, tmp_path, monkeypatch) -> None:
        from reapc.quantize import gguf

        def refuse(*_: object, **__: object) -> None:
            raise CannotBeDone("the converter failed; its last lines:\n    AssertionError: no such head")

        monkeypatch.setattr(gguf, "convert", refuse)
        (tmp_path / "mine.toml").write_text(QWEN)
        code, out, _ = run_main(capsys, "rehearse", tmp_path / "mine.toml")
        assert code == 1
        assert "AssertionError: no such head" in out
        assert "It ended at 'convert'" in out
        assert "not reached" in out

    @pytest.mark.parametrize("exchanged", ["router", "experts"])
    def test_a_file_that_computes_another_model_is_found(
        self, cache, capsys, tmp_path, monkeypatch, exchanged: str
    ) -> None:
        """What a conversion that confuses experts would write: two rows of each router, or the down projections of all
        pairs of experts, in each other's place."""
        from reapc.quantize import gguf

        convert = gguf.convert

        def confused(checkpoint: Path, out: Path, *arguments: Any, **named: Any) -> None:
            other = tmp_path / "confused"
            shutil.copytree(checkpoint, other)
            for path in other.glob("*.safetensors"):
                tensors = load_file(path)
                for name in list(tensors):
                    if exchanged == "router" and name.endswith("mlp.gate.weight"):
                        tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]
                    if exchanged == "experts" and (found := re.search(r"experts\.(\d+)\.down_proj", name)):
                        place = int(found[1])
                        pair = name.replace(f"experts.{place}.", f"experts.{place ^ 1}.")
                        if place % 2 == 0 and pair in tensors:
                            tensors[name], tensors[pair] = tensors[pair], tensors[name]
                save_file(tensors, path, metadata={"format": "pt"})
            convert(other, out, *arguments, **named)

        monkeypatch.setattr(gguf, "convert", confused)
        (tmp_path / "mine.toml").write_text(QWEN)
        code, out, _ = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--no-serve")
        assert code == 1, out
        assert "It ended at 'convert'" in out
        assert "another model" in out

    def test_mtp_layers_and_a_published_format_are_rehearsed(self, cache, capsys, tmp_path: Path) -> None:
        """From FP8 as published to the launch line that drafts, without another quantization."""
        (tmp_path / "mine.toml").write_text(QWEN.replace("Qwen/Qwen3-30B-A3B", "zai-org/GLM-5-FP8"))
        keep = tmp_path / "keep"
        changes = ("prune.mtp=prune", "prune.ratio=0.25", "target.name=h100x8", "serve.speculative=mtp",
                   "quantize.method=none")  # fmt: skip
        sets = [part for change in changes for part in ("--set", change)]
        code, out, _ = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--keep", keep, "--json", *sets)
        report = json.loads(out.strip().splitlines()[-1])
        assert code == 0, report
        steps = {step["name"]: step for step in report["steps"]}
        assert "fp8-block, as the source" in steps["make"]["seen"]
        assert "as predicted" in steps["emit"]["seen"]
        assert report["format"] == "fp8-block"
        manifest = json.loads((keep / "out/manifest.json").read_text())
        assert manifest["as_stored"]
        spec = model_spec(load_config(keep / "out/model"))
        assert len(spec.mtp_layers) == 1
        assert f"{spec.mtp_layers[0].prefix}.mlp.experts.0.up_proj.weight_scale_inv" in Checkpoint(
            keep / "out/model"
        ).entries  # fmt: skip
        assert "--speculative-config" in (keep / "out/serve.sh").read_text()

    def test_a_fault_of_a_library_is_no_traceback(self, cache, capsys, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("reapc.passes.observe", lambda *a, **k: [][1])
        (tmp_path / "mine.toml").write_text(QWEN)
        keep = tmp_path / "keep"
        code, out, _ = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--keep", keep)
        assert code == 1
        assert "IndexError" in out
        assert "Traceback" in (keep / "rehearsal.log").read_text()


# Published quantized, and what becomes of it: kept, or decoded for another format.
PUBLISHED = {
    "deepseek_v32_h100x8": "fp8-block",
    "kimi_k2_h100x8": "fp8-block",
    "gpt_oss_120b_strix_halo": "mxfp4:experts",
    "minimax_m2_rtx3090x4": "fp8-block",
}
# The one in the normal suite: a 744B model with latent and sparse attention, MTP and 2 bit weights.
RECIPES = [
    pytest.param(path, id=path.stem, marks=() if path.stem == "glm5_3090x8" else pytest.mark.slow)
    for path in sorted((ROOT / "recipes").glob("*.toml"))
]


@pytest.mark.parametrize("path", RECIPES)
@pytest.mark.usefixtures("cache")
def test_every_recipe(path: Path) -> None:
    """In a process of its own, as a user runs it: transformers' logger keeps the stream of the test it was made in."""
    command = [sys.executable, "-m", "reapc", "rehearse", path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr + done.stdout
    code, report = done.returncode, json.loads(done.stdout.strip().splitlines()[-1])
    failed = [(step["name"], step["seen"], *step["words"]) for step in report["steps"] if step["state"] == "failed"]
    assert code == 0, failed
    made = next(step for step in report["steps"] if step["name"] == "make")
    assert (
        (f"{PUBLISHED[path.stem]}" in made["seen"]) if path.stem in PUBLISHED else "as the source" not in made["seen"]
    )
    served = next(step for step in report["steps"] if step["name"] == "serve")
    if report["engine"] == "llama.cpp":
        assert (served["state"], "tokens answered" in served["seen"]) == ("ok", True), served


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine", "made"),
    [
        ("moonshotai/Kimi-K2.5", "vllm", "ct-w4g32:experts"),
        ("zai-org/GLM-4.5-FP8", "vllm", "fp8"),
        ("openai/gpt-oss-20b", "vllm", "mxfp4:experts"),
        ("deepseek-ai/DeepSeek-V4-Flash", "llama.cpp", "fp8-block"),
    ],
)
def test_models_as_they_are_published(name: str, engine: str, made: str, cache, capsys, tmp_path: Path) -> None:
    """vLLM serves the bytes as they are; llama.cpp reads DeepSeek-V4's fp4 experts as we do."""
    (tmp_path / "mine.toml").write_text(QWEN.replace("Qwen/Qwen3-30B-A3B", name).replace("rtx3090x1", "h100x8"))
    target = "h100x8" if engine == "vllm" else "ram256"
    sets = [part for change in (f"serve.engine={engine}", f"target.name={target}", "prune.ratio=0.25",
            "quantize.method=none", "serve.context=8192") for part in ("--set", change)]  # fmt: skip
    code, out, _ = run_main(capsys, "rehearse", tmp_path / "mine.toml", "--keep", tmp_path / "keep", "--json", *sets)
    report = json.loads(out.strip().splitlines()[-1])
    assert code == 0, report
    steps = {step["name"]: step for step in report["steps"]}
    assert f"{made}, as the source" in steps["make"]["seen"]
    if engine == "vllm":
        assert report["format"] == made
        assert "as predicted" in steps["emit"]["seen"]
