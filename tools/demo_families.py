"""The architectures that the training tool knows, each with how its router's load is kept even."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from demo_data import MAX_POSITIONS, VOCABULARY
from demo_engine import EXPERTS_NAME
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS, TOP_K = 24, 4
BIAS_STEP = 1e-3  # DeepSeek-V3's rate, arXiv 2412.19437, 4.2
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "use_cache": True,
}


@contextmanager
def recorded_choices(model: PreTrainedModel) -> Iterator[dict[int, list[Tensor]]]:
    """The experts chosen (tokens, top-k) in every forward inside, by layer; layers without experts are left out."""
    chosen: dict[int, list[Tensor]] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: chosen.setdefault(layer, []).append(output[2].detach())

    hooks = [router.register_forward_hook(keep(layer)) for layer, router in routers(model).items()]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def routers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The router of each layer that has one."""
    layers = enumerate(model.model.layers)
    return {index: layer.mlp.gate for index, layer in layers if isinstance(getattr(layer.mlp, "gate", None), nn.Module)}


def _qwen3_loss(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, float]:
    """The loss to minimize, with a term for even load, and the language model's part of it."""
    output = model(input_ids=rows, labels=rows, output_router_logits=True, use_cache=False)
    return output.loss, float(output.loss.detach() - model.config.router_aux_loss_coef * output.aux_loss.detach())


def _plain_loss(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, float]:
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    return loss, float(loss.detach())


@torch.no_grad()
def _move_biases(model: PreTrainedModel, chosen: dict[int, list[Tensor]]) -> None:
    """Load balancing without a loss: the bias of an expert with less than the mean load rises by a step, else falls."""
    for layer, router in routers(model).items():
        load = torch.bincount(torch.cat(chosen[layer]).flatten(), minlength=EXPERTS).float()
        router.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)


@dataclass(frozen=True)
class Family:
    """``describe``: the model in a few words; ``loss``: see above; ``after_step``: with the choices of the step;
    ``special_tokens``: what llama.cpp's converter of the family looks for."""

    describe: str
    make: Callable[[], PreTrainedModel]
    loss: Callable[[PreTrainedModel, Tensor], tuple[Tensor, float]]
    after_step: Callable[[PreTrainedModel, dict[int, list[Tensor]]], None] | None = None
    special_tokens: tuple[str, ...] = ()

    def build(self, seed: int) -> PreTrainedModel:
        """The model with random weights, in float32, on the fast expert routine."""
        torch.manual_seed(seed)
        model = self.make()
        model.set_experts_implementation(EXPERTS_NAME)
        return model


def _qwen3() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **_COMMON, num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.003
    )
    return Qwen3MoeForCausalLM(config)


def _glm4() -> PreTrainedModel:
    config = Glm4MoeConfig(
        **_COMMON,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=False,
        num_nextn_predict_layers=0,
    )
    return Glm4MoeForCausalLM(config)


FAMILIES = {
    "qwen3": Family("Qwen3-MoE (softmax router, no shared expert)", _qwen3, _qwen3_loss),
    "glm4": Family(
        "GLM-4-MoE (sigmoid router with correction bias, a shared expert, the first layer dense)",
        _glm4,
        _plain_loss,
        _move_biases,
        ("[gMASK]", "<|user|>", "<|observation|>"),
    ),
}
