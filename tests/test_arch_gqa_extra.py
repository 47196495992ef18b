"""Cases that tests/test_arch_gqa.py does not hold: each kills a mutation that survives it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from gqa_models import LLAMA3, TINY, convert, gguf_shapes, publish, save, transformers_model
from mla_models import header

from reapc.arch import model_spec
from reapc.errors import ReapcError

MORE: dict[str, dict[str, Any]] = {
    "olmoe grouped": {**TINY["olmoe"], "num_key_value_heads": 2, "norm_topk_prob": True},
    "olmoe biased": {**TINY["olmoe"], "attention_bias": True, "tie_word_embeddings": True},
    "granitemoe biased": {**TINY["granitemoe"], "attention_bias": True},
    "mixtral llama3": {**TINY["mixtral"], "rope_scaling": LLAMA3, "sliding_window": None},
    "ernie interval": {**TINY["ernie4_5_moe"], "num_hidden_layers": 6, "moe_layer_interval": 2,
                       "moe_layer_end_index": 4, "tie_word_embeddings": False},
    "minimax plain": {**TINY["minimax_m2"], "tie_word_embeddings": True},
    "glm groups": {**TINY["glm4_moe"], "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "use_qk_norm": False,
                   "num_nextn_predict_layers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("more") for name in MORE}
    for name, folder in folders.items():
        save(MORE[name], folder)
        publish(MORE[name], folder)
    return folders


@pytest.mark.parametrize("name", MORE)
def test_saved(name: str, saved: dict[str, Path]) -> None:
    spec = model_spec(deepcopy(MORE[name]))
    assert {t.name: t.shape for t in spec.tensors()} == header(saved[name] / "model.safetensors")


def test_converted(saved: dict[str, Path]) -> None:
    for name, found in convert(saved).items():
        spec = model_spec(deepcopy(MORE[name]))
        assert "error" not in found, (name, found["error"])
        assert gguf_shapes(spec) == {k: tuple(s) for k, (s, _) in found["tensors"].items()}, name


def test_gate_is_w1_and_up_is_w3() -> None:
    """facts/tensor-naming.json: w1 = gate, w3 = up, w2 = down."""
    for name in ("minimax_m2", "mixtral", "phimoe"):
        groups = {g.name: g.gguf[0].name for g, _ in model_spec(deepcopy(TINY[name])).groups() if g.role == "expert"}
        assert {key.split("}.")[1]: part for key, part in groups.items()} == {
            "w1.weight": "ffn_gate_exps.weight", "w3.weight": "ffn_up_exps.weight", "w2.weight": "ffn_down_exps.weight",
        }  # fmt: skip


def test_ernie_keeps_float32_what_transformers_does() -> None:
    import torch
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoePreTrainedModel as Base

    keep = Base._keep_in_fp32_modules_strict
    with torch.device("meta"):
        names = transformers_model(deepcopy(TINY["ernie4_5_moe"])).state_dict()
    want = {n.replace(".gate.moe_statics", ".moe_statics") for n in names if any(k in n for k in keep)}
    spec = model_spec(deepcopy(TINY["ernie4_5_moe"]))
    got = {f"{layer.prefix}.{g.name}" for layer in spec.layers for g in layer.kind.tensors if g.dtype == "float32"}
    assert want == got


def test_numbers() -> None:
    glm = model_spec(deepcopy(MORE["glm groups"]))
    assert (glm.n_group, glm.topk_group, len(glm.mtp_layers)) == (4, 2, 2)
    qwen = deepcopy(TINY["qwen2_moe"])
    assert (model_spec(qwen).shared_experts, model_spec(qwen).norm_topk) == (1, False)
    assert model_spec({**qwen, "norm_topk_prob": True}).norm_topk
    assert model_spec(deepcopy(MORE["ernie interval"])).moe_layers == (1, 3)
    ernie = {k: v for k, v in TINY["ernie4_5_moe"].items() if k != "tie_word_embeddings"}
    assert model_spec(ernie).tied_embeddings  # Ernie4_5_MoeConfig's default
    phi = model_spec({**deepcopy(TINY["phimoe plain"]), "sliding_window": 8})
    assert {s.window for layer in phi.layers for s in layer.kind.cache} == {8}
    for name in ("olmoe", "granitemoe"):
        config = {k: v for k, v in TINY[name].items() if k != "num_key_value_heads"}
        assert model_spec(config).num_kv_heads == 4


@pytest.mark.parametrize("name", ["olmoe", "granitemoe"])
@pytest.mark.parametrize("heads", [0, -1])
def test_kv_heads_out_of_range(name: str, heads: int) -> None:
    with pytest.raises(ReapcError, match="num_key_value_heads"):
        model_spec({**deepcopy(TINY[name]), "num_key_value_heads": heads})


@pytest.mark.parametrize(("key", "value"), [("head_dim", 0), ("head_dim", -1), ("max_position_embeddings", -1)])
def test_sizes_out_of_range(key: str, value: int) -> None:
    with pytest.raises(ReapcError, match=key):
        model_spec({**deepcopy(TINY["mixtral"]), key: value})
