"""GLM-4.x (sigmoid router, correction bias, shared expert, MTP) from observe over prune to a reloaded result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_glm4, make_tokens, run_main
from safetensors.torch import load_file, save_file
from test_prune import load, tree_digest

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.observe.observe import observe
from reapc.observe.scores import Scores
from reapc.progress import Silent
from reapc.prune.criteria import choose, groups_of
from reapc.prune.rewrite import prune
from reapc.stream import StreamedModel
from reapc.stream.experts import LayerObserver, RoutedPairs
from reapc.stream.tokens import Tokens

ROUTERS = {
    "as published": {},
    "not renormalised": {"norm_topk_prob": False, "routed_scaling_factor": 0.7},
    "groups": {"n_group": 4, "topk_group": 2},
}


class Log(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


def blocks(folder: Path, tokens: Tokens) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], torch.nn.Module]:
    """Inputs and routed outputs (tokens, hidden) of every MoE block in transformers' whole model, and the model.

    The routed output is the block's, less what its shared expert adds."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    inputs: dict[int, torch.Tensor] = {}
    routed: dict[int, torch.Tensor] = {}

    def hook(layer: int):
        def seen(block, args, output):
            inputs[layer] = args[0].reshape(-1, args[0].shape[-1])
            routed[layer] = (output - block.shared_experts(args[0])).reshape(inputs[layer].shape)

        return seen

    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_hook(hook(i))
    with torch.no_grad():
        model(torch.from_numpy(tokens.input_ids.astype(np.int64)))
    return inputs, routed, model


def by_hand(block: torch.nn.Module, hidden: torch.Tensor, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts and gate weights (tokens, top-k) by the formula of the paper, in float64."""
    scores = 1 / (1 + torch.exp(-hidden.double() @ block.gate.weight.double().T))
    choice = scores + block.gate.e_score_correction_bias.double()
    groups, limit = settings.get("n_group", 1), settings.get("topk_group", 1)
    parts = choice.reshape(len(choice), groups, -1)
    best = parts.sort(-1, descending=True).values[..., :2].sum(-1).sort(-1, descending=True).indices[:, :limit]
    allowed = torch.zeros(len(choice), groups, dtype=torch.bool).scatter_(1, best, True)
    choice = torch.where(allowed.repeat_interleave(parts.shape[-1], 1), choice, -torch.inf)
    chosen = choice.sort(-1, descending=True).indices[:, :3]
    weights = scores.gather(1, chosen)
    if settings.get("norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights * settings.get("routed_scaling_factor", 2.5)


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_recorded_gate_weight_is_the_coefficient_of_the_model(tmp_path: Path, settings: dict) -> None:
    """Sum over chosen experts of recorded weight x expert output = the block's routed output; and the sums that the
    scores file keeps are those of the routing formula."""
    folder = make_glm4(tmp_path / "m", **settings)
    tokens = make_tokens(3, 20)
    inputs, routed, model = blocks(folder, tokens)
    checkpoint = Checkpoint(folder)
    streamed = StreamedModel(checkpoint)

    class Recorder(LayerObserver):
        """Adds weight x output of every routed pair to the row of the token that it belongs to."""

        def __init__(self, hidden: torch.Tensor) -> None:
            self.hidden, self.total, self.pairs = hidden, torch.zeros_like(hidden), 0

        def routed(self, pairs: RoutedPairs) -> None:
            rows = torch.cdist(pairs.inputs, self.hidden).argmin(1)
            torch.testing.assert_close(pairs.inputs, self.hidden[rows], rtol=1e-4, atol=1e-4)
            assert pairs.tokens.tolist() == rows.tolist()
            self.total.index_add_(0, rows, pairs.outputs * pairs.gate[:, None])
            self.pairs += len(pairs.gate)

    hidden = streamed.embed(torch.from_numpy(tokens.input_ids.astype(np.int64)))
    for index, layer in enumerate(checkpoint.spec.layers):
        recorder = Recorder(inputs[index]) if layer.is_moe else None
        with streamed.layer(index) as forward:
            hidden = forward(hidden, None, recorder)
        if recorder:
            assert recorder.pairs == 60 * 3
            assert recorder.total.abs().mean() > 0.1
            torch.testing.assert_close(recorder.total, routed[index], rtol=1e-4, atol=1e-4)

    scores = observe(checkpoint, tokens, tmp_path / "w", Silent())
    assert scores.layers == [1, 2]
    changed = False
    for index in scores.layers:
        block = model.model.layers[index].mlp
        chosen, weights = by_hand(block, inputs[index], settings)
        plain = (inputs[index] @ block.gate.weight.T).topk(3).indices
        changed |= bool((plain.sort().values != chosen.sort().values).any())
        sums = {"routed_tokens": np.zeros(12), "gate_sum": np.zeros(12), "gate_norm_sum": np.zeros(12)}
        for row in range(len(chosen)):
            for expert, weight in zip(chosen[row].tolist(), weights[row].tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[expert].double() @ inputs[index][row].double()).chunk(2)
                out = block.experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)
                for name, value in zip(sums, (1, weight, weight * float(out.detach().norm())), strict=True):
                    sums[name][expert] += value
        for name, expected in sums.items():
            np.testing.assert_allclose(scores.layer(index)[name], expected, rtol=1e-4, err_msg=f"{index} {name}")
    assert changed, "the bias never changed a choice: this model proves nothing"


def test_observing_in_bfloat16_keeps_the_bias_in_fp32(tmp_path: Path) -> None:
    folder = make_glm4(tmp_path / "m", dtype=torch.bfloat16)
    checkpoint = Checkpoint(folder)
    tokens = make_tokens(4, 32)
    exact = observe(checkpoint, tokens, tmp_path / "a", Silent())
    rounded = observe(checkpoint, tokens, tmp_path / "b", Silent(), dtype=torch.bfloat16)
    for index in exact.layers:
        a, b = (s.layer(index)["gate_norm_sum"] for s in (exact, rounded))
        assert np.abs(a - b).sum() / a.sum() < 0.1
    model = StreamedModel(checkpoint, torch.bfloat16)
    with model.layer(1):
        gate = model._module.mlp.gate  # type: ignore[union-attr]
        assert gate.e_score_correction_bias.dtype == torch.float32
        stored = checkpoint.tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert torch.equal(gate.e_score_correction_bias, stored)
        assert gate.weight.dtype == torch.bfloat16


def hand_made(source: Path, kept: dict[int, list[int]]) -> torch.nn.Module:
    """transformers' own model of ``source``, its modules cut to the experts ``kept``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for index, experts in kept.items():
        block = model.model.layers[index].mlp
        block.experts.gate_up_proj.data = block.experts.gate_up_proj.data[experts]
        block.experts.down_proj.data = block.experts.down_proj.data[experts]
        block.gate.weight.data = block.gate.weight.data[experts]
        block.gate.e_score_correction_bias = block.gate.e_score_correction_bias[experts]
        block.experts.num_experts = block.gate.num_experts = len(experts)
    return model


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 7), ({"mtp": False}, 7), ({"dtype": torch.bfloat16}, 9), ({"n_group": 4, "topk_group": 2}, 8)],
    ids=["mtp", "no mtp", "bf16", "groups"],
)
def test_pruned_model_equals_hand_made_one(tmp_path: Path, settings: dict, count: int) -> None:
    source = make_glm4(tmp_path / "m", **settings)
    before = tree_digest(source)
    checkpoint = Checkpoint(source)
    has_mtp = settings.get("mtp", True)
    assert any(name.startswith("model.layers.3.") for name in checkpoint.entries) == has_mtp
    scores = observe(checkpoint, make_tokens(4, 32), tmp_path / "w", Silent())
    kept = choose(scores, "reap", count, groups_of(checkpoint.spec))
    assert list(kept) == [1, 2]
    log = Log()
    prune(checkpoint, kept, tmp_path / "out", log)
    assert tree_digest(source) == before

    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", source))
    assert config == {**original, "n_routed_experts": count, "num_nextn_predict_layers": 0}
    assert has_mtp == any("MTP" in line and "num_nextn_predict_layers = 0" in line for line in log.lines)
    result, tensors = load(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("model.layers.3.") for name in tensors)
    for index, experts in kept.items():
        name = f"model.layers.{index}.mlp.gate.e_score_correction_bias"
        assert tensors[name].dtype == torch.float32
        assert torch.equal(tensors[name], checkpoint.tensor(name)[experts])
    ids = torch.from_numpy(make_tokens(2, 20, seed=5).input_ids.astype(np.int64))
    with torch.no_grad():
        logits = result(ids).logits
        assert torch.equal(hand_made(source, kept)(ids).logits, logits)
        other = {layer: [*experts[1:], experts[0]] for layer, experts in kept.items()}
        shifted = hand_made(source, other)  # the same experts in another order: the same function, as a check
        torch.testing.assert_close(
            shifted(ids).logits, logits, rtol=1e-3, atol=1e-3
        ) if "n_group" not in settings else 0
        for index in kept:
            gate = shifted.model.layers[index].mlp.gate
            gate.e_score_correction_bias = gate.e_score_correction_bias.roll(1)
        assert not torch.allclose(shifted(ids).logits, logits, rtol=1e-2, atol=1e-2)


def test_result_can_be_observed_and_pruned_again(tiny_glm4: Path, tmp_path: Path) -> None:
    tokens = make_tokens(4, 32)
    first = Checkpoint(tiny_glm4)
    prune(first, choose(observe(first, tokens, tmp_path / "w", Silent()), "reap", 9), tmp_path / "9", Silent())
    second = Checkpoint(tmp_path / "9")
    assert (second.spec.num_experts, second.spec.mtp_layers) == (9, ())
    log = Log()
    prune(second, choose(observe(second, tokens, tmp_path / "w", log), "reap", 5), tmp_path / "5", log)
    assert not any("MTP" in line for line in log.lines)
    assert load(tmp_path / "5").config.n_routed_experts == 5


class TestGroups:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Checkpoint:
        return Checkpoint(make_glm4(tmp_path / "m", n_group=4, topk_group=2))

    def test_each_group_keeps_its_own_best(self) -> None:
        names = ("routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")
        scores = Scores({"layers": [0]}, {f"layers.0.{n}": np.ones(6) for n in names})
        scores.arrays["layers.0.gate_norm_sum"] = np.array([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
        assert choose(scores, "reap", 4) == {0: [0, 1, 2, 4]}
        assert choose(scores, "reap", 4, groups=2) == {0: [0, 1, 4, 5]}
        assert choose(scores, "reap", 2, groups=2) == {0: [0, 4]}
        with pytest.raises(ReapcError, match="do not divide into 2 groups"):
            choose(scores, "reap", 3, groups=2)

    def test_unequal_groups_are_refused(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        uneven = [0, 1, 2, 3, 4, 6, 7, 9]  # 3, 2, 2, 1
        with pytest.raises(
            ReapcError, match=r"layer 1: the experts kept are \[3, 2, 2, 1\](?s:.*)keep 2 of every group"
        ):
            prune(checkpoint, {1: uneven, 2: uneven}, tmp_path / "out", Silent())
        with pytest.raises(ReapcError, match=r"layer 1: 7 experts do not fill the router's 4 groups"):
            prune(checkpoint, {1: [*range(7)], 2: [*range(7)]}, tmp_path / "out", Silent())
        with pytest.raises(ReapcError, match=r"multiple of 4, at least 8"):
            prune(checkpoint, {1: [0, 3, 6, 9], 2: [0, 3, 6, 9]}, tmp_path / "out", Silent())
        assert not (tmp_path / "out").exists()

    def test_a_router_that_looks_into_every_group_is_not_bound(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint(make_glm4(tmp_path / "m", n_group=4, topk_group=4))
        assert groups_of(checkpoint.spec) == 1
        uneven = [0, 1, 2, 3, 4, 6, 7, 9]
        kept = {1: uneven, 2: uneven}
        prune(checkpoint, kept, tmp_path / "out", Silent())
        ids = torch.arange(40)[None]
        with torch.no_grad():
            assert torch.equal(hand_made(checkpoint.folder, kept)(ids).logits, load(tmp_path / "out")(ids).logits)


def test_commands(tiny_glm4: Path, tmp_path: Path, capsys) -> None:
    save_file({"input_ids": torch.from_numpy(make_tokens(4, 32).input_ids)}, tmp_path / "tokens.safetensors")
    scores = tmp_path / "scores.safetensors"
    code, text, err = run_main(
        capsys, "observe", tiny_glm4, "--tokens", tmp_path / "tokens.safetensors", "--out", scores, "--json"
    )
    assert code == 0, err
    assert json.loads(text)["layers"] == [1, 2]
    code, text, err = run_main(
        capsys, "prune", tiny_glm4, "--scores", scores, "--experts", 7, "--out", tmp_path / "out", "--json"
    )
    assert code == 0, err
    assert "num_nextn_predict_layers = 0" in err
    assert {len(experts) for experts in json.loads(text)["dropped"].values()} == {5}
    assert load(tmp_path / "out").config.n_routed_experts == 7


RECIPE = """
[model]
source = "model"

[target]
ram = "200MB"

[serve]
engine = "llama.cpp"
context = 256

[prune]
experts = 7

[quantize]
format = "Q4_K_M"
pre_tokenizer = "qwen2"

[calibration]
data = "tokens.safetensors"
sequences = 8
tokens = 64

[verify]
sequences = 2
"""


@pytest.mark.usefixtures("cache")
def test_build_to_gguf(tmp_path: Path, capsys) -> None:
    """The whole compiler: the GGUF holds the bytes that were planned and computes what the pruned checkpoint does; the
    importance matrix names tensors of its own."""
    from gguf import GGUFReader
    from mla_models import TOKENS
    from transformers import AutoTokenizer

    from reapc.quantize.imatrix import entries_of

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)  # the converter asks GLM's tokenizer for them
    model = make_glm4(
        tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=256, moe_intermediate_size=256,
        head_dim=64, vocab_size=len(tokenizer), initializer_range=0.05,
    )  # fmt: skip
    tokenizer.save_pretrained(model)
    tokens = make_tokens(10, 64, vocab=2000)
    save_file({"input_ids": torch.from_numpy(tokens.input_ids)}, tmp_path / "tokens.safetensors")
    (tmp_path / "glm.toml").write_text(RECIPE)
    code, _, err = run_main(capsys, "build", tmp_path / "glm.toml", "--out", tmp_path / "out")
    assert code == 0, err
    assert "num_nextn_predict_layers = 0" in err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["experts_kept"], manifest["format"]) == (7, "Q4_K_M")
    fit = {row["name"]: row for row in manifest["fit"]}
    assert fit["weights"]["predicted_bytes"] == fit["weights"]["actual_bytes"]
    assert 0 < manifest["fidelity"]["kl"] < 1

    code, _, err = run_main(
        capsys, "prune", model, "--scores", tmp_path / "out" / "scores.safetensors", "--experts", 7,
        "--out", tmp_path / "pruned",
    )  # fmt: skip
    assert code == 0, err
    command = ("quantize", tmp_path / "pruned", "--format", "Q8_0", "--no-imatrix", "--pre-tokenizer", "qwen2")
    code, _, err = run_main(capsys, *command, "--out", tmp_path / "q8.gguf")
    assert code == 0, err
    files = (tmp_path / "pruned", tmp_path / "q8.gguf")
    code, text, err = run_main(capsys, "compare", *files, "--tokens", tmp_path / "tokens.safetensors", "--json")
    assert code == 0, err
    assert json.loads(text)["kl"] < 0.01
    assert json.loads(text)["top1"] > 0.9

    scores = observe(Checkpoint(tmp_path / "pruned"), tokens, tmp_path / "w", Silent())
    shapes = {t.name: t.shape.tolist() for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    entries = entries_of(scores, Checkpoint(tmp_path / "pruned").spec)
    assert {"blk.0.ffn_down.weight", "blk.2.ffn_up_shexp.weight", "blk.2.ffn_down_exps.weight"} <= set(entries)
    for name, (sums, _) in entries.items():
        assert sums.shape[-1] == shapes[name][0], name
