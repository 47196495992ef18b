"""Tiny real models, made once per session."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))

from reapc.stream.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent


def make_model(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shards: str = "50GB", **changes
) -> Path:
    """Saves a random Qwen3-MoE with uneven routing and returns its folder."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=12, num_experts_per_tok=3, vocab_size=256,
        max_position_embeddings=512, norm_topk_prob=True, tie_word_embeddings=True, mlp_only_layers=[1],
        decoder_sparse_step=1, initializer_range=0.2, rope_theta=10000.0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "notes.txt").write_text("kept as it is\n")
    return folder


def make_glm4(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, mtp: bool = True, **changes) -> Path:
    """Saves a random GLM-4.x MoE as it is published: the correction bias in fp32, large enough to change choices, and
    with ``mtp`` an MTP layer behind the main ones, which transformers' class does not save."""
    from mla_models import mtp_tensors
    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    from reapc.arch import load_config, model_spec

    torch.manual_seed(seed)
    settings = dict(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=1,
        first_k_dense_replace=1, vocab_size=256, max_position_embeddings=512, norm_topk_prob=True,
        routed_scaling_factor=2.5, use_qk_norm=True, initializer_range=0.2, num_nextn_predict_layers=int(mtp),
    )  # fmt: skip
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**{**settings, **changes}))
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(buffer.shape) * 0.3
    model.save_pretrained(folder)
    if mtp:
        tensors = load_file(folder / "model.safetensors")
        for tensor in mtp_tensors(model_spec(load_config(folder))):
            kind = torch.float32 if tensor.name.endswith("e_score_correction_bias") else dtype
            tensors[tensor.name] = (torch.randn(tensor.shape) * 0.02).to(kind)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_project(folder: Path, recipe: str, *, sequences: int = 20, length: int = 64, **changes) -> Path:
    """``folder`` with tiny.toml, a model of two layers with the demo's tokenizer, and token ids."""
    settings = {"num_hidden_layers": 2, "vocab_size": 2048, "mlp_only_layers": [], "initializer_range": 0.05}
    make_model(folder / "model", **{**settings, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "demo" / "model" / name, folder / "model" / name)
    ids = np.random.default_rng(0).integers(0, 2000, (sequences, length)).astype(np.int32)
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    (folder / "tiny.toml").write_text(recipe)
    return folder


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command line; a traceback in either is a failure."""
    from reapc.cli.main import main

    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    return int(exit_.value.code or 0), out, err


def make_tokens(sequences: int, length: int, vocab: int = 256, seed: int = 0, padded: bool = False) -> Tokens:
    """Random token ids; ``padded`` hides the end of every other sequence."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocab, (sequences, length)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    if padded:
        for row in range(0, sequences, 2):
            mask[row, length - 3 - row % 5 :] = False
    return Tokens(np.where(mask, ids, 0).astype(np.int32), mask, np.zeros(sequences, np.int32))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_glm4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_glm4(tmp_path_factory.mktemp("tiny-glm4"))


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of the tests' own, with the real llama.cpp tools linked into it."""
    from reapc.toolchain import require

    require("quantize")
    from reapc.stages import cache_root

    cache = tmp_path_factory.mktemp("cache")
    (cache / "reapc").mkdir()
    if (cache_root() / "llama.cpp").is_dir():
        (cache / "reapc" / "llama.cpp").symlink_to(cache_root() / "llama.cpp")
    return str(cache)


@pytest.fixture
def cache(tools: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", tools)
    return tools


@pytest.fixture
def stage_folders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where each stage of a build lies that is run from now on, by the stage's name."""
    from reapc.stages import StageCache

    found: dict[str, Path] = {}
    run = StageCache.run

    def watched(cache: StageCache, name: str, depends_on, work):
        found[name], key = run(cache, name, depends_on, work)
        return found[name], key

    monkeypatch.setattr(StageCache, "run", watched)
    return found


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two real builds with markup in every name, for the tests of reports: ``plain`` and ``healed``."""
    from report_builds import two_builds

    return two_builds(tmp_path_factory.mktemp("reports"))
