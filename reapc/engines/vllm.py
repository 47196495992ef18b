"""vLLM: parallel layouts that it accepts, and what every card holds.

Read in vLLM 0.33.0 (facts/vllm-legality.md); none of it was run on a card by us. Weights and KV are exact from
shapes, the rest is a model and carries its source.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from reapc.arch import ModelSpec
from reapc.engines.render import render
from reapc.plan import DeviceBytes, Placement, Plan
from reapc.recipe import Recipe
from reapc.target import Target

NAME = "vllm"
WEIGHT_BYTES = 2  # bf16
BLOCK_TOKENS = 16
VOCAB_PAD = 64
MAX_BATCHED_TOKENS = 2048
MIB = 2**20

# vLLM's default; the plan emits it, and counts the rest of the card as overhead.
GPU_MEMORY_UTILIZATION = 0.92
# Non-torch memory, CUDA graphs and allocator slack: 1.5 GiB on one card, 2.0 GiB with NCCL, an estimate
# (facts/vllm-legality.md: cudagraph 0.17 to 0.58 GiB and non-torch 0.07 to 0.6 GiB were seen).
OVERHEAD_ONE_CARD_BYTES = 1536 * MIB
OVERHEAD_MANY_CARDS_BYTES = 2048 * MIB
KV_ELEMENT_BYTES = {"auto": 2, "fp8": 1}


def kv_type(requested: str) -> str:
    """The value of --kv-cache-dtype: f16 and bf16 are the model's own type, "auto"."""
    return "auto" if requested in ("auto", "f16", "bf16") else requested


def legal(spec: ModelSpec, fmt: str, target: Target, recipe: Recipe) -> str | None:
    """Why vLLM cannot serve this, or None."""
    if not target.gpus:
        return "vLLM needs a GPU here: without one reapc serves with llama.cpp"
    if target.kind != "cuda":
        return f"vLLM is planned for CUDA cards only; the target's cards are {target.kind}"
    kv = kv_type(recipe.serve.kv_cache)
    if kv not in KV_ELEMENT_BYTES:
        return f"vLLM has no {kv} KV cache (it has auto and fp8)"
    capability = _capability(target)
    if kv == "fp8" and (capability is None or capability < (8, 9)):
        return f"an fp8 KV cache needs compute capability 8.9; the target says {target.compute_capability or 'nothing'}"
    if capability is not None and capability < (8, 0):
        return f"bfloat16 needs compute capability 8.0; the target has {target.compute_capability}"
    reasons = [_layout_refusal(spec, tp, target.gpus // tp) for tp in _divisors(target.gpus)]
    if all(reasons):
        return f"no layout over {target.gpus} cards: {'; '.join(dict.fromkeys(r for r in reasons if r))}"
    return None


def _capability(target: Target) -> tuple[int, int] | None:
    if target.compute_capability is None:
        return None
    major, minor = target.compute_capability.split(".")
    return int(major), int(minor)


def _divisors(count: int) -> list[int]:
    return [n for n in range(count, 0, -1) if count % n == 0]


def _layout_refusal(spec: ModelSpec, tp: int, pp: int) -> str | None:
    if spec.num_heads % tp:
        return f"{spec.num_heads} attention heads do not divide over {tp} cards"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"{spec.num_kv_heads} KV heads neither divide over {tp} cards nor are a divisor of {tp}"
    if spec.expert_intermediate_size % tp:
        return f"experts of {spec.expert_intermediate_size} columns do not divide over {tp} cards"
    if len(spec.moe_layers) < spec.num_layers and spec.dense_intermediate_size % tp:
        return f"dense layers of {spec.dense_intermediate_size} columns do not divide over {tp} cards"
    if pp > spec.num_layers:
        return f"{spec.num_layers} layers do not make {pp} pipeline stages"
    return None


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers per pipeline stage: even, the remainder goes to the stages before the last (vLLM's get_pp_indices)."""
    counts = [layers // stages] * stages
    for i in range(2, layers % stages + 2):
        counts[-i] += 1
    return counts


def _layer_bytes(spec: ModelSpec, index: int, tp: int) -> int:
    """Weight bytes of one layer on one card: norms and router are replicated, K and V too beyond one head a card."""
    total = 0
    width, hidden, head = spec.expert_intermediate_size, spec.hidden_size, spec.head_dim
    layer = spec.layers[index]
    kv_heads = max(1, spec.num_kv_heads // tp)
    q = spec.num_heads // tp * head
    total += q * hidden * 2 + 2 * kv_heads * head * hidden  # q and o, k and v
    total += 2 * hidden + 2 * head  # norms
    if any(t.name.endswith(".bias") for t in takewhile(lambda t: t.expert is None, layer.tensors)):
        total += q + 2 * kv_heads * head + hidden
    if layer.is_moe:
        total += spec.num_experts * hidden  # router
        total += 3 * spec.num_experts * (width // tp) * hidden
    else:
        total += 3 * (spec.dense_intermediate_size // tp) * hidden
    return total * WEIGHT_BYTES


def activation_bytes(spec: ModelSpec, tp: int, sequences: int) -> int:
    """Peak of the dummy forward over MAX_BATCHED_TOKENS tokens: a model, not measured.

    Per token: hidden state, residual and their copies (6 hidden), the routed experts' inner rows (3 * top-k * width
    / TP) and outputs (2 * top-k * hidden), all bf16; plus float32 logits, twice, of one token per sequence.
    """
    per_token = 6 * spec.hidden_size + spec.top_k * (3 * spec.expert_intermediate_size // tp + 2 * spec.hidden_size)
    return MAX_BATCHED_TOKENS * per_token * 2 + 2 * 4 * sequences * spec.vocab_size


def _layout(spec: ModelSpec, target: Target, recipe: Recipe, tp: int, pp: int) -> Placement:
    serve = recipe.serve
    kv_size = KV_ELEMENT_BYTES[kv_type(serve.kv_cache)]
    tokens = -(-serve.context // BLOCK_TOKENS) * BLOCK_TOKENS * serve.concurrency + BLOCK_TOKENS  # one null block
    vocab_rows = -(-(-(-spec.vocab_size // VOCAB_PAD) * VOCAB_PAD) // tp)
    embedding = vocab_rows * spec.hidden_size * WEIGHT_BYTES
    overhead = OVERHEAD_ONE_CARD_BYTES if target.gpus == 1 else OVERHEAD_MANY_CARDS_BYTES
    reserve = round(target.vram * (1 - GPU_MEMORY_UTILIZATION))
    counts = stage_layers(spec.num_layers, pp)
    devices, start = [], 0
    for stage, count in enumerate(counts):
        weights = sum(_layer_bytes(spec, i, tp) for i in range(start, start + count))
        start += count
        if stage == 0:
            weights += embedding
        if stage == pp - 1:
            weights += spec.hidden_size * WEIGHT_BYTES
            if not spec.tied_embeddings or pp > 1:
                weights += embedding
        kv = count * tokens * 2 * max(1, spec.num_kv_heads // tp) * spec.head_dim * kv_size
        for rank in range(tp):
            devices.append(
                DeviceBytes(
                    name=target.devices[stage * tp + rank].name,
                    capacity_bytes=target.vram,
                    weights_bytes=weights,
                    kv_bytes=kv,
                    workspace_bytes=activation_bytes(spec, tp, serve.concurrency),
                    overhead_bytes=overhead + reserve,
                )
            )
    return Placement(tensor_parallel=tp, pipeline_parallel=pp, layers_per_device=tuple(counts), devices=tuple(devices))


def place(spec: ModelSpec, fmt: str, target: Target, recipe: Recipe) -> Placement:
    """The legal layout over all cards that leaves the fullest card most; more tensor parallelism on a tie."""
    layouts = [
        _layout(spec, target, recipe, tp, target.gpus // tp)
        for tp in _divisors(target.gpus)
        if _layout_refusal(spec, tp, target.gpus // tp) is None
    ]
    return max(layouts, key=lambda layout: min(device.free_bytes for device in layout.devices))


def serve_script(plan: Plan, model_path_relative: str, recipe: Recipe) -> str:
    """The text of serve.sh."""
    chosen = plan.chosen
    tp, pp = chosen.placement.tensor_parallel, chosen.placement.pipeline_parallel
    devices = chosen.placement.devices
    geforce = any("RTX" in device.name and "PRO" not in device.name for device in devices)
    values: dict[str, Any] = {
        "gpus": len(devices),
        # vLLM refuses to start unless its whole share of a card is free
        "needs": [-(-round(device.capacity_bytes * GPU_MEMORY_UTILIZATION) // MIB) for device in devices],
        "tp": tp,
        "pp": pp,
        "context": chosen.context,
        "sequences": chosen.concurrency,
        "kv": chosen.kv_dtype,
        "utilization": GPU_MEMORY_UTILIZATION,
        "batched": MAX_BATCHED_TOKENS,
        "no_custom_all_reduce": geforce and tp > 1,
    }
    return render("vllm.sh.j2", plan, model_path_relative, recipe, values)
