"""The command line on a tiny model: every figure, every refusal and its exit code, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_tokens
from safetensors.numpy import save_file

from reapc.cli.main import COMMANDS, main
from reapc.stream.tokens import Tokens

LAYER_KEYS = {"routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "max_activation", "reap", "ean"}
ROOMY = '[model]\nsource = "{}"\n[serve]\ncontext = 256\n[target]\nram = "8GB"\n'


def save(path: Path, tokens: Tokens, masked: bool = False) -> Path:
    mask = {"attention_mask": tokens.mask.astype(np.int32)} if masked else {}
    save_file({"input_ids": tokens.input_ids} | mask, path)
    return path


class Cli:
    """Runs commands in this process; ``fails`` also wants a message and no output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def _run(self, *arguments: object) -> tuple[object, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return caught.value.code, captured.out, captured.err

    def __call__(self, *arguments: object) -> str:
        code, out, err = self._run(*arguments)
        assert code == 0, err
        return out

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))

    def fails(self, expected: int, *arguments: object) -> str:
        code, out, err = self._run(*arguments)
        assert (code, out) == (expected, ""), err
        return err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture(scope="module")
def work(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens.safetensors, scores.safetensors and the model pruned to 9 experts in pruned/."""
    folder = tmp_path_factory.mktemp("work")
    save(folder / "tokens.safetensors", make_tokens(6, 24))
    for arguments in (
        ["observe", tiny, "--tokens", folder / "tokens.safetensors", "--out", folder / "scores.safetensors"],
        ["prune", tiny, "--scores", folder / "scores.safetensors", "--experts", "9", "--out", folder / "pruned"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 0
    return folder


def logits_of(folder: Path, tokens: Tokens) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.from_numpy(tokens.input_ids.astype(np.int64))
        return model(ids, attention_mask=torch.from_numpy(tokens.mask).long()).logits


def independent(a: Path, b: Path, tokens: Tokens) -> dict[str, float]:
    first, second = (logits_of(folder, tokens).log_softmax(-1) for folder in (a, b))
    mask = torch.from_numpy(tokens.mask)
    following = mask[:, 1:] & mask[:, :-1]
    ids = torch.from_numpy(tokens.input_ids.astype(np.int64))[:, 1:, None]

    def perplexity(log_probs: torch.Tensor) -> float:
        return float(torch.exp(-log_probs[:, :-1].gather(2, ids)[..., 0][following].double().mean()))

    return {
        "kl": float((first.exp() * (first - second)).sum(-1)[mask].double().mean()),
        "top1": float((first.argmax(-1) == second.argmax(-1))[mask].double().mean()),
        "perplexity_a": perplexity(first),
        "perplexity_b": perplexity(second),
        "tokens": int(mask.sum()),
    }


def test_observe_prints_a_summary(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    tokens = save(tmp_path / "t.safetensors", make_tokens(3, 16))
    summary = cli.json("observe", tiny, "--tokens", tokens, "--out", tmp_path / "s.safetensors")
    assert (summary["tokens"], summary["layers"]) == (48, [0, 2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "t.safetensors"]


def test_scores_show(cli: Cli, tiny: Path, work: Path) -> None:
    shown = cli.json("scores", "show", work / "scores.safetensors")
    assert shown["model"] == str(tiny)
    assert shown["tokens"] == 6 * 24
    assert set(shown["layers"]) == {"0", "2"}
    for layer in shown["layers"].values():
        assert set(layer) >= LAYER_KEYS
        assert {name: len(values) for name, values in layer.items()} == dict.fromkeys(layer, 12)
        assert sum(layer["routed_tokens"]) == 6 * 24 * 3
        assert all(isinstance(count, int) for count in layer["routed_tokens"])
        assert sum(layer["gate_sum"]) == pytest.approx(6 * 24, rel=1e-5)
        for expert, count in enumerate(layer["routed_tokens"]):
            for mean, total in (("reap", "gate_norm_sum"), ("ean", "norm_sum")):
                assert layer[mean][expert] == pytest.approx(layer[total][expert] / max(count, 1))
    text = cli("scores", "show", work / "scores.safetensors")
    assert "144 tokens" in text


def test_scores_merge(cli: Cli, work: Path, tmp_path: Path) -> None:
    scores = work / "scores.safetensors"
    cli("scores", "merge", scores, "--out", tmp_path / "m.safetensors")
    once, merged = (cli.json("scores", "show", path) for path in (scores, tmp_path / "m.safetensors"))
    assert merged == once
    message = cli.fails(2, "scores", "merge", scores, scores, "--out", tmp_path / "x.safetensors")
    assert "would count twice" in message
    assert "exists already" in cli.fails(2, "scores", "merge", scores, "--out", tmp_path / "m.safetensors")


def test_prune_drops_the_lowest(cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
    scores, out = work / "scores.safetensors", tmp_path / "out"
    summary = cli.json("prune", tiny, "--scores", scores, "--ratio", 0.25, "--out", out)
    assert summary["experts_kept"] == 9
    assert summary["output"] == str(out)
    assert summary["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    for layer, values in cli.json("scores", "show", scores)["layers"].items():
        assert summary["dropped"][layer] == sorted(np.argsort(values["reap"], kind="stable")[:3].tolist())
    config = json.loads((out / "config.json").read_text())
    assert {config[key] for key in ("num_experts", "num_local_experts") if key in config} == {9}


def test_a_model_against_itself(cli: Cli, tiny: Path, work: Path) -> None:
    found = cli.json("compare", tiny, tiny, "--tokens", work / "tokens.safetensors")
    assert set(found) == {"kl", "top1", "perplexity_a", "perplexity_b", "tokens"}
    assert abs(found["kl"]) < 1e-6
    assert found["top1"] == 1
    assert found["perplexity_a"] == found["perplexity_b"] > 1
    assert found["tokens"] == 6 * 24


@pytest.mark.parametrize("padded", [False, True])
def test_compare_equals_plain_transformers(cli: Cli, tiny: Path, work: Path, tmp_path: Path, padded: bool) -> None:
    tokens = make_tokens(5, 20, seed=9, padded=padded)
    assert tokens.mask.all() != padded
    file = save(tmp_path / "held.safetensors", tokens, masked=padded)
    for a, b in ((tiny, work / "pruned"), (work / "pruned", tiny)):
        found = cli.json("compare", a, b, "--tokens", file)
        expected = independent(a, b, tokens)
        assert expected["kl"] > 1e-3
        assert 0 < expected["top1"] < 1
        assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_compare_by_domain_and_as_text(cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
    tokens = make_tokens(4, 16, seed=2)
    domain = np.array([0, 1, 1, 0], np.int32)
    metadata = {"domains": json.dumps(["law", "code"])}
    save_file({"input_ids": tokens.input_ids, "domain": domain}, tmp_path / "t.safetensors", metadata=metadata)
    found = cli.json("compare", tiny, work / "pruned", "--tokens", tmp_path / "t.safetensors")
    assert set(found["domains"]) == {"law", "code"}
    for index, name in enumerate(("law", "code")):
        expected = independent(tiny, work / "pruned", tokens.take(np.flatnonzero(domain == index)))
        assert found["domains"][name] == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    text = cli("compare", tiny, work / "pruned", "--tokens", tmp_path / "t.safetensors")
    assert f"KL(A || B) {found['kl']:.5f} nats" in text
    assert "law: KL" in text


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that llama.cpp's converter takes: no dense layers."""
    return make_model(tmp_path_factory.mktemp("sparse"), mlp_only_layers=[])


def test_plan(cli: Cli, sparse: Path, tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(ROOMY.format(tiny))
    assert "does not know dense layers" in cli.fails(1, "plan", recipe)
    tiny = sparse
    recipe.write_text(ROOMY.format(tiny))
    plan = cli.json("plan", recipe)["plan"]
    assert plan["model"] == str(tiny)
    assert (plan["experts"]["count"], plan["experts"]["top_k"]) == (12, 3)
    assert plan["experts_kept"] == 12
    assert plan["engine"] == "llama.cpp"
    asked = cli.json("plan", recipe, "--set", "prune.experts=10", "--set", "quantize.format=Q8_0")["plan"]
    assert (asked["experts_kept"], asked["format"]) == (10, "Q8_0")
    assert "experts" in cli("plan", recipe)
    assert "did you mean 'ratio'?" in cli.fails(2, "plan", recipe, "--set", "prune.ration=0.1")
    cli.fails(1, "plan", recipe, "--set", "target.ram=1MB")


def test_plan_imports_neither_torch_nor_transformers(sparse: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(ROOMY.format(sparse))
    code = (
        "import sys\nfrom reapc.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nprint(sorted({'torch', 'transformers', 'reapc.planner'} & set(sys.modules)))\n"
    )
    for options in ([], ["--json"], ["--explain"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "plan", recipe, *options], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "['reapc.planner']"


def test_help_and_version(cli: Cli) -> None:
    text = cli("--help")
    assert all(name in text for name in COMMANDS)
    for name in COMMANDS:
        assert f"reapc {name}" in cli(name, "--help")
    assert cli("--version").startswith("reapc, version ")


class TestRefusals:
    """Wrong requests: the exit code, what was found and where."""

    @pytest.mark.parametrize("command", ["observe", "prune", "compare", "plan"])
    def test_no_such_model(self, cli: Cli, work: Path, tmp_path: Path, command: str) -> None:
        (tmp_path / "r.toml").write_text(ROOMY.format("./nosuch"))
        tokens, scores = work / "tokens.safetensors", work / "scores.safetensors"
        arguments = {
            "observe": ["./nosuch", "--tokens", tokens, "--out", tmp_path / "s"],
            "prune": ["./nosuch", "--scores", scores, "--ratio", 0.25, "--out", tmp_path / "o"],
            "compare": ["./nosuch", "./nosuch", "--tokens", tokens],
            "plan": [tmp_path / "r.toml"],
        }[command]
        error = cli.fails(2, command, *arguments)
        assert error.startswith("error: ")
        assert "nosuch" in error
        assert [p.name for p in tmp_path.iterdir()] == ["r.toml"]

    @pytest.mark.parametrize("command", ["observe", "prune", "compare", "plan"])
    def test_dense_model(self, cli: Cli, work: Path, tmp_path: Path, command: str) -> None:
        dense = tmp_path / "dense"
        dense.mkdir()
        (dense / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 8}))
        (tmp_path / "r.toml").write_text(ROOMY.format(dense))
        tokens = work / "tokens.safetensors"
        arguments = {
            "observe": [dense, "--tokens", tokens, "--out", tmp_path / "s"],
            "prune": [dense, "--scores", work / "scores.safetensors", "--ratio", 0.25, "--out", tmp_path / "o"],
            "compare": [dense, dense, "--tokens", tokens],
            "plan": [tmp_path / "r.toml"],
        }[command]
        error = cli.fails(1, command, *arguments)
        assert "config.json: no experts to prune" in error
        assert "'qwen3' is a dense model" in error

    def test_folder_without_a_model(self, cli: Cli, work: Path, tmp_path: Path) -> None:
        error = cli.fails(2, "observe", tmp_path, "--tokens", work / "tokens.safetensors", "--out", tmp_path / "s")
        assert "config.json" in error

    @pytest.mark.parametrize("request_", [("--ratio", 0.9), ("--experts", 2)])
    def test_fewer_than_top_k(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path, request_: tuple) -> None:
        scores = work / "scores.safetensors"
        error = cli.fails(2, "prune", tiny, "--scores", scores, *request_, "--out", tmp_path / "o")
        assert "top-k of 3" in error
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "request_",
        [
            (), ("--ratio", 0.25, "--experts", 9), ("--ratio", 1), ("--ratio", -0.1), ("--ratio", "lots"),
            ("--experts", 13), ("--ratio", 0.2, "--criterion", "x"),
        ],
    )  # fmt: skip
    def test_wrong_amount(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path, request_: tuple) -> None:
        cli.fails(2, "prune", tiny, "--scores", work / "scores.safetensors", *request_, "--out", tmp_path / "o")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("command", ["observe", "compare"])
    def test_bad_tokens(self, cli: Cli, tiny: Path, tmp_path: Path, command: str) -> None:
        files: dict[str, dict[str, np.ndarray]] = {
            "the model's vocabulary has 256": {"input_ids": np.array([[1, 256]], np.int32)},
            "token ids -1 to 3": {"input_ids": np.array([[3, -1]], np.int32)},
            "no tensor 'input_ids'; found: ids": {"ids": np.array([[1, 2]], np.int32)},
            "float32 [1, 2]": {"input_ids": np.array([[1, 2]], np.float32)},
            "int32 [1, 1, 2]": {"input_ids": np.array([[[1, 2]]], np.int32)},
            "attention_mask [1, 3]": {
                "input_ids": np.ones((1, 2), np.int32),
                "attention_mask": np.ones((1, 3), np.int32),
            },
            "hides every token": {"input_ids": np.ones((1, 2), np.int32), "attention_mask": np.zeros((1, 2), np.int32)},
        }
        file = tmp_path / "t.safetensors"
        models = [tiny, "--out", tmp_path / "s"] if command == "observe" else [tiny, tiny]
        for message, arrays in files.items():
            save_file(arrays, file)
            error = cli.fails(2, command, *models, "--tokens", file)
            assert message in error
            assert str(file) in error
        file.write_bytes(b"not a safetensors file")
        assert f"{file}: truncated or not safetensors" in cli.fails(2, command, *models, "--tokens", file)
        file.unlink()
        assert f"{file}: no such file" in cli.fails(2, command, *models, "--tokens", file)
        save_file({"input_ids": np.ones((1, 2), np.int32)}, file, metadata={"domains": "not json"})
        assert f"{file}: " in cli.fails(2, command, *models, "--tokens", file)

    def test_scores_of_another_model(self, cli: Cli, work: Path, tmp_path: Path) -> None:
        scores = work / "scores.safetensors"
        other = make_model(tmp_path / "other", seed=1)
        error = cli.fails(2, "prune", other, "--scores", scores, "--ratio", 0.25, "--out", tmp_path / "o")
        assert "observed on other weights" in error
        larger = make_model(tmp_path / "larger", num_experts=16)
        error = cli.fails(2, "prune", larger, "--scores", scores, "--ratio", 0.25, "--out", tmp_path / "o")
        assert "with 12 experts" in error
        assert not (tmp_path / "o").exists()

    def test_no_scores(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
        common = ["--ratio", 0.25, "--out", tmp_path / "o"]
        assert "no such file" in cli.fails(2, "prune", tiny, "--scores", tmp_path / "nosuch", *common)
        error = cli.fails(2, "prune", tiny, "--scores", work / "tokens.safetensors", *common)
        assert "not a scores file" in error
        assert "not a scores file" in cli.fails(2, "scores", "show", tiny / "model.safetensors")

    def test_output_exists(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
        out = tmp_path / "here"
        out.write_text("mine")
        tokens, scores = work / "tokens.safetensors", work / "scores.safetensors"
        assert "exists already" in cli.fails(2, "observe", tiny, "--tokens", tokens, "--out", out)
        assert "exists already" in cli.fails(2, "prune", tiny, "--scores", scores, "--ratio", 0.25, "--out", out)
        assert "exists already" in cli.fails(2, "quantize", tiny, "--format", "Q8_0", "--out", out)
        assert out.read_text() == "mine"

    def test_data_and_tokens(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
        both = ["--tokens", work / "tokens.safetensors", "--data", "x.txt"]
        assert "both given" in cli.fails(2, "observe", tiny, *both, "--out", tmp_path / "s")
        error = cli.fails(2, "observe", tiny, "--data", tmp_path / "nosuch.txt", "--out", tmp_path / "s")
        assert "nosuch.txt" in error
        for data in (tmp_path / "text.txt", "auto"):
            (tmp_path / "text.txt").write_text("words " * 1000)
            error = cli.fails(2, "observe", tiny, "--data", data, "--out", tmp_path / "s")
            assert f"{tiny}: no usable tokenizer" in error

    def test_a_tokenizer_of_another_model(self, cli: Cli, tmp_path: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = Tokenizer(models.WordLevel({"known": 0, "far": 400, "?": 1}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        model = make_model(tmp_path / "m")
        words.save(str(model / "tokenizer.json"))
        (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        text = tmp_path / "text.txt"
        arguments = ["observe", model, "--data", text, "--length", 16, "--sequences", 2, "--out", tmp_path / "s"]
        text.write_text("known far " * 20)
        assert "gives token id 400, the model's vocabulary has 256" in cli.fails(2, *arguments)
        text.write_text("known words " * 20)
        assert cli.json(*arguments)["tokens"] == 32

    def test_unknown_command_and_option(self, cli: Cli) -> None:
        error = cli.fails(2, "comprae")
        assert "no command 'comprae'" in error
        assert "did you mean 'compare'?" in error
        assert "No such option" in cli.fails(2, "compare", "--tokns", "x")
        assert "Missing" in cli.fails(2, "compare", "a", "b")
        assert "No such command" in cli.fails(2, "scores", "shwo")
        assert "did you mean 'Q4_K_M'?" in cli.fails(2, "quantize", "m", "--format", "Q4KM", "--out", "x")

    @pytest.mark.parametrize(
        "junk", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"not a gguf file at all, but long enough to be read" * 4,
                 b"GGUF\x03\0\0\0" + b"\0" * 16, b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\x09" + b"\0" * 7]
    )  # fmt: skip
    def test_corrupt_gguf(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path, junk: bytes) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(junk)
        for pair in ((tiny, file), (file, tiny)):
            error = cli.fails(2, "compare", *pair, "--tokens", work / "tokens.safetensors")
            assert error.startswith(f"error: {file}: ")

    def test_other_files_are_not_models(self, cli: Cli, tiny: Path, work: Path) -> None:
        tokens = work / "tokens.safetensors"
        error = cli.fails(2, "compare", tiny, tiny / "config.json", "--tokens", tokens)
        assert "neither a checkpoint folder nor a .gguf file" in error

    def test_different_vocabularies(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
        other = make_model(tmp_path / "m", vocab_size=320)
        error = cli.fails(2, "compare", tiny, other, "--tokens", work / "tokens.safetensors")
        assert "different vocabularies: [256, 320]" in error

    def test_a_shard_cut_short(self, cli: Cli, tiny: Path, work: Path, tmp_path: Path) -> None:
        broken = make_model(tmp_path / "m")
        shard = broken / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-10])
        error = cli.fails(2, "compare", tiny, broken, "--tokens", work / "tokens.safetensors")
        assert f"{shard}: truncated" in error


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reapc", "plan", tmp_path / "nosuch.toml"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'nosuch.toml'}: cannot read the recipe: No such file or directory\n"
