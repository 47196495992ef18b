"""Scores against an independent routed-only reference made with plain transformers hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens
from safetensors.numpy import load_file, save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.observe import observe as observe_module
from reapc.observe.combine import merge
from reapc.observe.observe import observe
from reapc.observe.scores import load_scores
from reapc.progress import Silent
from reapc.stream import run as run_module
from reapc.stream.tokens import Tokens


def reference(folder: Path, tokens: Tokens) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Routing sums and second moments, one token and expert at a time, from the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    routing: dict[str, np.ndarray] = {}
    moments: dict[str, np.ndarray] = {}
    mask = torch.from_numpy(tokens.mask)

    def hook_experts(layer: int):
        def hook(module, args):
            hidden, index, weights = args
            names = ("routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")
            sums = {n: routing.setdefault(f"layers.{layer}.{n}", np.zeros(module.num_experts)) for n in names}
            up_in = moments.setdefault(
                f"layers.{layer}.experts.gate_up", np.zeros((module.num_experts, hidden.shape[1]))
            )
            for token in torch.nonzero(mask.reshape(-1))[:, 0].tolist():
                for slot in range(index.shape[1]):
                    e, g = int(index[token, slot]), float(weights[token, slot])
                    gate, up = (module.gate_up_proj[e].double() @ hidden[token].double()).chunk(2)
                    out = module.down_proj[e].double() @ (torch.nn.functional.silu(gate) * up)
                    n = float(out.norm())
                    for name, value in zip(names[:5], (1, g, n, g * n, (g * n) ** 2), strict=True):
                        sums[name][e] += value
                    sums["max_activation"][e] = max(sums["max_activation"][e], float(out.abs().max()))
                    up_in[e] += hidden[token].double().square().numpy()

        return hook

    def hook_linear(name: str):
        def hook(_, args):
            real = args[0][mask].double()
            moments[name] = moments.get(name, 0) + real.square().sum(0).numpy()

        return hook

    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(hook_experts(i))
        layer.self_attn.o_proj.register_forward_pre_hook(hook_linear(f"model.layers.{i}.self_attn.o_proj"))
        layer.self_attn.k_proj.register_forward_pre_hook(hook_linear(f"model.layers.{i}.self_attn.k_proj"))
    with torch.no_grad():
        model(torch.from_numpy(tokens.input_ids.astype(np.int64)), attention_mask=mask.long())
    return routing, moments


@pytest.mark.parametrize(("sequences", "padded"), [(1, False), (6, False), (6, True)])
def test_scores_match_reference(tiny: Path, tmp_path: Path, sequences: int, padded: bool, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "TOKENS_PER_BATCH", 48)
    tokens = make_tokens(sequences, 24, padded=padded)
    scores = observe(Checkpoint(tiny), tokens, tmp_path / "work", Silent())
    routing, moments = reference(tiny, tokens)
    assert routing
    for name, expected in routing.items():
        np.testing.assert_allclose(scores.total(name), expected, rtol=1e-5, atol=1e-9, err_msg=name)
    for name, expected in moments.items():
        np.testing.assert_allclose(scores.total(f"second_moment.{name}"), expected, rtol=1e-4, atol=1e-7, err_msg=name)
    layer = scores.layer(0)
    count = routing["layers.0.routed_tokens"]
    expected = routing["layers.0.gate_norm_sum"] / np.maximum(count, 1)
    np.testing.assert_allclose(layer["reap"], expected, rtol=1e-5)
    assert scores.header["tokens"] == tokens.count
    assert not (tmp_path / "work").exists()


def test_never_routed_scores_zero_and_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", num_experts=24, num_experts_per_tok=2)
    lines: list[str] = []

    class Log(Silent):
        def log(self, line: str) -> None:
            lines.append(line)

    scores = observe(Checkpoint(folder), make_tokens(1, 3), tmp_path / "w", Log())
    never = scores.never_routed()[0]
    assert len(never) >= 24 - 6
    assert (scores.layer(0)["reap"][never] == 0).all()
    assert np.isfinite(scores.layer(0)["reap"]).all()
    assert any("layer 0" in line and str(never[0]) in line for line in lines)
    assert scores.to_json()["never_routed"]["0"] == never


def test_resume_continues_at_the_layer_and_ends_in_the_same_scores(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    tokens = make_tokens(5, 16)
    whole = observe(Checkpoint(tiny), tokens, tmp_path / "a", Silent())
    real = observe_module.run_layers
    seen: list[int] = []

    def stop_at_2(model, sets, observer_of, layer_done, progress, start_layer=0, name="", plan=None):
        def observers(index: int):
            if index == 2:
                raise KeyboardInterrupt
            return observer_of(index)

        real(model, sets, observers, layer_done, progress, start_layer, name, plan)

    monkeypatch.setattr(observe_module, "run_layers", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        observe(Checkpoint(tiny), tokens, tmp_path / "b", Silent())

    def record(model, sets, observer_of, layer_done, progress, start_layer=0, name="", plan=None):
        seen.append(start_layer)
        real(model, sets, observer_of, layer_done, progress, start_layer, name, plan)

    monkeypatch.setattr(observe_module, "run_layers", record)
    resumed = observe(Checkpoint(tiny), tokens, tmp_path / "b", Silent())
    assert seen == [2]
    assert set(whole.arrays) == set(resumed.arrays)
    for name, values in whole.arrays.items():
        np.testing.assert_array_equal(values, resumed.arrays[name])


def test_save_load_merge(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny)
    tokens = make_tokens(4, 16)
    whole = observe(checkpoint, tokens, tmp_path / "w", Silent())
    parts = [observe(checkpoint, tokens.take(np.array(r)), tmp_path / "w", Silent()) for r in ([0, 1], [2, 3])]
    for i, part in enumerate(parts):
        part.save(tmp_path / f"{i}.safetensors")
    merged = merge([load_scores(tmp_path / f"{i}.safetensors") for i in range(2)])
    assert merged.header["tokens"] == 64
    for name in whole.arrays:
        np.testing.assert_allclose(merged.total(name), whole.total(name), rtol=1e-5, atol=1e-9, err_msg=name)
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ReapcError, match="do not belong together"):
        merge([whole, observe(Checkpoint(other), tokens, tmp_path / "w", Silent())])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.5.up_proj.weight", "model.embed_tokens.weight"])
def test_nan_weights_are_named(tiny: Path, tmp_path: Path, bad: float, name: str) -> None:
    folder = make_model(tmp_path / "m")
    arrays = load_file(folder / "model.safetensors")
    arrays[name][3, 4] = bad
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(ReapcError, match=name.replace(".", r"\.")):
        observe(Checkpoint(folder), make_tokens(1, 8), tmp_path / "w", Silent())


def test_foreign_work_folder_is_untouched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("mine")
    with pytest.raises(ReapcError, match="left untouched"):
        observe(Checkpoint(tiny), make_tokens(1, 8), tmp_path / "w", Silent())
    assert (tmp_path / "w" / "thesis.txt").read_text() == "mine"


def test_work_folder_that_a_kill_left_without_its_stamp_is_used_again(tiny: Path, tmp_path: Path) -> None:
    for name in ("identity.partial", "hidden-held-out-0.bin", "layer-0.safetensors"):
        (tmp_path / name).write_text("left over")
    scores = observe(Checkpoint(tiny), make_tokens(1, 8), tmp_path, Silent())
    assert scores.header["tokens"] == 8
