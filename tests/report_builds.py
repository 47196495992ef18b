"""Build folders for the tests of reports: real ones are built, a large one is written with made-up scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_project
from safetensors.numpy import save_file

from reapc.observe.accumulate import PARTS, ROUTING
from reapc.observe.scores import Scores
from reapc.plan import Candidate, DeviceBytes, Placement, Plan, Refusal
from reapc.prune.criteria import choose
from reapc.prune.stability import stability

GIB = 1 << 30
EVIL = "<script>alert('x')</script>&\"><img src=x onerror=alert(1)>"
MODEL = "mo<script>alert(1)<_script>del"
RECIPE = f"""
[model]
source = {json.dumps(MODEL)}

[target]
name = "rtx4090"
description = {json.dumps(EVIL)}

[serve]
engine = "vllm"
context = 512

[prune]
experts = 9

[quantize]
format = "fp8"

[calibration]
data = "tokens.safetensors"
sequences = 48
tokens = 64

[verify]
sequences = 24
data = "held_out.safetensors"
"""


def make_texts(folder: Path) -> Path:
    """A recipe, a model and texts in whose names and words there is markup."""
    import torch
    from tokenizers import Tokenizer

    changes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    make_project(folder, RECIPE, dtype=torch.bfloat16, **changes)
    (folder / "model").rename(folder / MODEL)
    tokenizer = Tokenizer.from_file(str(folder / MODEL / "tokenizer.json"))
    words = np.array(tokenizer.encode(f"<p>{EVIL}</p> the größte 日本 file\n\tif x > 1 && y < 2:").ids)
    for name, rows in (("tokens", 48), ("held_out", 24)):
        ids = np.stack([np.resize(np.roll(words, 5 * row), 64) for row in range(rows)])
        noise = np.random.default_rng(len(name)).integers(0, 2000, ids.shape)
        ids = np.where(np.random.default_rng(1).random(ids.shape) < 0.2, noise, ids).astype(np.int32)
        mask = np.ones(ids.shape, bool)
        mask[::5, 50:] = False
        arrays = {"input_ids": ids, "attention_mask": mask, "domain": (np.arange(rows) % 2).astype(np.int32)}
        save_file(arrays, folder / f"{name}.safetensors", metadata={"domains": json.dumps([EVIL, "law"])})
    return folder


def two_builds(folder: Path) -> dict[str, Path]:
    """``plain`` and ``healed``, built of the same model in ``folder`` (with tiny.toml) and measured on one text."""
    from reapc.cli.main import main

    project, found = make_texts(folder / "project"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, options in (("plain", []), ("healed", ["--set", "prune.heal=true", "--set", "prune.experts=8"])):
            found[name] = project / "out" / name
            with pytest.raises(SystemExit) as ended:
                main(["build", str(project / "tiny.toml"), "--out", str(found[name]), *options])
            assert ended.value.code == 0
    return found


def large_scores(layers: int, experts: int, seed: int = 0) -> Scores:
    """Two domains, uneven load, some experts that no token was routed to."""
    random = np.random.default_rng(seed)
    arrays, parts = {}, np.full((2, PARTS), 4096)
    for layer in range(3, 3 + layers):
        load = random.lognormal(0, 1, experts) * (random.random(experts) > 0.01)
        routed = random.poisson(load * 40, (2, PARTS, experts)).astype(np.float64)
        gate, norm = random.uniform(0.1, 0.4, experts), random.lognormal(0, 0.6, experts)
        made = {
            "routed_tokens": routed, "gate_sum": routed * gate, "norm_sum": routed * norm,
            "gate_norm_sum": routed * gate * norm, "gate_norm_sq_sum": routed * (gate * norm) ** 2,
            "max_activation": (routed > 0) * norm * 9,
        }  # fmt: skip
        assert set(made) == set(ROUTING)
        arrays.update({f"layers.{layer}.{name}": values for name, values in made.items()})
    header = {
        "model": "big", "digest": "d" * 64, "num_experts": experts, "top_k": 8, "layers": list(range(3, 3 + layers)),
        "tokens": int(parts.sum()), "calibration": ["a", "b"], "dtype": "float32", "domains": ["code", "prose"],
        "parts": parts.tolist(), "sequences": (parts // 512).tolist(),
    }  # fmt: skip
    return Scores(header, arrays)


def candidate(experts: int, kept: int, fmt: str = "IQ3_XXS", cards: int = 8, loss: float = 0.21) -> Candidate:
    devices = tuple(
        DeviceBytes(
            name=f"RTX 3090 {i}", capacity_bytes=24 * GIB - (700 << 20), weights_bytes=18 * GIB + (i == 0) * GIB,
            kv_bytes=GIB, workspace_bytes=GIB // 2, overhead_bytes=GIB,
        )
        for i in range(cards)
    )  # fmt: skip
    host = DeviceBytes(name="host", capacity_bytes=2 * GIB, weights_bytes=2 * GIB, given=False)
    return Candidate(
        engine="llama.cpp", format=fmt, experts_kept=kept, prune_ratio=1 - kept / experts, context=32768,
        concurrency=1, kv_dtype="f16", file_bytes=150 * GIB, weights_bytes=149 * GIB, kv_bytes=8 * GIB,
        bits_per_expert_weight=3.06, predicted_loss=loss, decode_tokens_per_second_ceiling=21.5,
        placement=Placement(layers_per_device=(10,) * 7 + (8,), devices=(*devices, host), notes=("slow: a note",)),
    )  # fmt: skip


def write_large(folder: Path, layers: int = 75, experts: int = 256, kept: int = 160) -> Path:
    """A build folder as large as GLM-5's, without weights and without fidelity.json."""
    folder.mkdir(parents=True)
    scores = large_scores(layers, experts)
    scores.save(folder / "scores.safetensors")
    stays = choose(scores, "reap", kept)
    plan = Plan(
        model="zai-org/GLM-5", family="glm_moe_dsa", target="rtx3090x8", num_experts=experts, top_k=8, criterion="reap",
        chosen=candidate(experts, kept), loss_source="measured", reasons=("It fits.", "Nothing better does."),
        runners_up=(candidate(experts, kept - 8, "IQ3_S", loss=0.25),),
        refused=tuple(Refusal(engine="vllm", format=f, reason="sparse attention needs 9.0") for f in ("fp8", "w4a16")),
    )  # fmt: skip
    (folder / "plan.json").write_text(json.dumps({"from_prior": plan.to_json(), "from_scores": plan.to_json()}))
    manifest: dict[str, Any] = {
        "key": "0" * 64, "recipe_name": "glm5", "recipe": {"calibration": {"seed": 3}}, "artifact": "model.gguf",
        "model": {"source": plan.model, "digest": "d" * 64}, "experts_kept": kept, "format": "IQ3_XXS",
        "engine": "llama.cpp", "kept": {str(layer): found for layer, found in stays.items()},
        "stability": stability(scores, "reap", kept).to_json(),
        "healing": {
            "healed": True, "before": figures(0.31, 0.71), "after": figures(0.18, 0.79),
            "layers": [
                {
                    "layer": layer, "fit": [1.0, 0.4 + layer / 300], "choice": [1.0, 0.5 + layer / 200],
                    "kept": layer != 9, "changed": kept,
                }
                for layer in scores.layers
            ],
        },
        "fit": [{"name": "file", "predicted_bytes": 150 * GIB, "actual_bytes": 150 * GIB - 999, "source": "disk"}],
        "fidelity": {**figures(0.22, 0.77), "domains": {"code": figures(0.2, 0.8), "prose": figures(0.24, 0.74)}},
        "stage_seconds": {"observe": 7200.5, "prune": 900.0}, "reused": ["prune"], "seconds": 9000.0,
        "date": "2026-11-29T00:00:00+00:00", "versions": {"reapc": "0.1.0"}, "files": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def figures(kl: float, top1: float) -> dict[str, Any]:
    return {"kl": kl, "top1": top1, "perplexity_a": 6.1, "perplexity_b": 6.9, "tokens": 32768, "domains": {}}
