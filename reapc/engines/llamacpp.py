"""llama.cpp: what llama-server accepts, and where it puts every byte (``-sm layer``, no CPU offload of experts).

Read in llama.cpp 0c1e57098 (facts/llamacpp-memory.md) and checked with llama-server on small models.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import ModelSpec
from reapc.engines.render import render
from reapc.formats import gguf
from reapc.plan import DeviceBytes, Placement, Plan
from reapc.recipe import Recipe
from reapc.target import Target

NAME = "llama.cpp"
MICRO_BATCH_TOKENS = 512
BATCH_TOKENS = 2048
CONTEXT_PAD_TOKENS = 256
MAX_DEVICES = 16
KV_TYPES = {"f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
GGML_TYPE_NUMBERS = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # as llama-cpp-python wants them
MIB = 2**20

# Measured 2026-11: RSS of llama-server (Linux x86-64, 2 cores, libraries counted) after a completion over 1900 tokens,
# less the buffers that it prints: 22.9 to 24.7 MiB with a vocabulary of 2048; the rest is a margin for more threads.
LLAMA_SERVER_BASE_BYTES = 30 * MIB
# Measured: a vocabulary of 151,936 tokens and as many merges adds 38 MiB (265 bytes per token).
TOKENIZER_BYTES_PER_TOKEN = 300
# CUDA context, cuBLAS and what ggml does not count: llama.cpp's own default for --fit-target.
GPU_OVERHEAD_BYTES = 1024 * MIB


def kv_type(requested: str) -> str:
    """The cache type that "auto" stands for."""
    return "f16" if requested == "auto" else requested


def padded_context(context: int) -> int:
    """Tokens of one slot: llama.cpp rounds up to 256."""
    return -(-context // CONTEXT_PAD_TOKENS) * CONTEXT_PAD_TOKENS


def legal(spec: ModelSpec, fmt: str, target: Target, recipe: Recipe) -> str | None:
    """Why llama.cpp cannot serve this, or None."""
    if not spec.norm_topk:
        return "llama.cpp renormalizes the top-k gate weights of this family; this model has norm_topk_prob = false"
    kv = kv_type(recipe.serve.kv_cache)
    if kv not in KV_TYPES:
        return f"llama.cpp has no {kv} KV cache (it has {', '.join(KV_TYPES)})"
    if (block := KV_TYPES[kv][0]) and spec.head_dim % block:
        return f"a {kv} KV cache needs a head size that is a multiple of {block}; this model has {spec.head_dim}"
    if fmt in gguf.NEEDS_IMATRIX and not recipe.quantize.imatrix:
        return f"{fmt} needs an importance matrix and the recipe says quantize.imatrix = false"
    if target.gpus > MAX_DEVICES:
        return f"llama.cpp is built for at most {MAX_DEVICES} cards; the target has {target.gpus}"
    if target.gpus > spec.num_layers:
        return f"{target.gpus} cards for {spec.num_layers} layers: -sm layer gives every card at least one layer"
    if spec.num_experts % spec.n_group:
        return f"{spec.num_experts} experts do not divide into the router's {spec.n_group} groups"
    return None


def kv_layer_bytes(spec: ModelSpec, layer: int, context: int, concurrency: int, kv: str) -> int:
    """KV cache of one layer over all slots, exact."""
    block, size = KV_TYPES[kv]
    return padded_context(context) * concurrency * spec.layers[layer].kv_elements // block * size


def workspace_bytes(spec: ModelSpec, context: int) -> int:
    """Compute buffer of one device: an upper bound, 0 to 60 % above five shapes measured with llama-server.

    The attention mask in f16 over one slot, plus float32 activations of one micro-batch: twice the experts' outputs,
    three times their inner rows, one hidden state; or the attention's, where that is more. llama-server computes
    logits only for the last token of each slot, so the vocabulary does not enter.
    """
    mask = padded_context(context) * MICRO_BATCH_TOKENS * 2
    hidden, top_k = spec.hidden_size, spec.top_k
    experts = 2 * hidden * top_k + 3 * spec.expert_intermediate_size * top_k + hidden
    attention = 3 * hidden + 2 * spec.num_heads * spec.head_dim
    dense = hidden + 3 * spec.dense_intermediate_size if len(spec.moe_layers) < spec.num_layers else 0
    return mask + max(experts, attention, dense) * 4 * MICRO_BATCH_TOKENS


def place(spec: ModelSpec, fmt: str, target: Target, recipe: Recipe) -> Placement:
    """Bytes per device. Layers go to cards in order, whole, so that the fullest card is as empty as possible."""
    tensors = gguf.tensor_types(spec, fmt, recipe.quantize.imatrix)
    serve = recipe.serve
    kv = kv_type(serve.kv_cache)
    layer_weights = [0] * spec.num_layers
    embedding = outer = 0
    for tensor in tensors:
        if tensor.name.startswith("blk."):
            layer_weights[int(tensor.name.split(".")[1])] += tensor.data_bytes
        elif tensor.name == "token_embd.weight":
            embedding = tensor.data_bytes
        else:
            outer += tensor.data_bytes
    layer_kv = [kv_layer_bytes(spec, i, serve.context, serve.concurrency, kv) for i in range(spec.num_layers)]
    workspace = workspace_bytes(spec, serve.context)
    base = LLAMA_SERVER_BASE_BYTES + TOKENIZER_BYTES_PER_TOKEN * spec.vocab_size
    if not target.gpus:
        ram = DeviceBytes(
            name="RAM",
            capacity_bytes=target.ram,
            weights_bytes=sum(layer_weights) + embedding + outer,
            kv_bytes=sum(layer_kv),
            workspace_bytes=workspace,
            overhead_bytes=base,
        )
        return Placement(layers_per_device=(spec.num_layers,), devices=(ram,))

    last = outer + (embedding if spec.tied_embeddings else 0)  # tied: the output is a second copy, on the card
    counts = split_layers([w + k for w, k in zip(layer_weights, layer_kv, strict=True)], target.gpus, last)
    devices, start = [], 0
    if target.gpus > 1:  # pipeline parallelism keeps four copies of the graph's inputs
        workspace += 3 * padded_context(serve.context) * MICRO_BATCH_TOKENS * 2
    for index, count in enumerate(counts):
        layers = range(start, start + count)
        start += count
        devices.append(
            DeviceBytes(
                name=target.devices[index].name,
                capacity_bytes=target.vram,
                weights_bytes=sum(layer_weights[i] for i in layers) + (last if index == target.gpus - 1 else 0),
                kv_bytes=sum(layer_kv[i] for i in layers),
                workspace_bytes=workspace,
                overhead_bytes=GPU_OVERHEAD_BYTES,
            )
        )
    if target.ram:
        devices.append(
            DeviceBytes(
                name="host RAM",
                capacity_bytes=target.ram,
                weights_bytes=embedding,
                kv_bytes=0,
                workspace_bytes=BATCH_TOKENS * spec.hidden_size * 4,
                overhead_bytes=base + GPU_OVERHEAD_BYTES,
            )
        )
    return Placement(pipeline_parallel=target.gpus, layers_per_device=tuple(counts), devices=tuple(devices))


def split_layers(costs: list[int], parts: int, last_extra: int) -> list[int]:
    """How many consecutive layers each card gets, at least one, so that the largest sum is smallest.

    ``last_extra`` bytes (output matrix) weigh on the last card. Bisection over the answer; exact.
    """

    def fill(limit: int) -> list[int] | None:
        counts, index = [], len(costs)
        for part in reversed(range(parts)):
            room, count = limit - (last_extra if part == parts - 1 else 0), 0
            while index > part and costs[index - 1] <= room:
                index -= 1
                room -= costs[index]
                count += 1
            if not count:
                return None
            counts.append(count)
        return counts[::-1] if index == 0 else None

    low, high = 0, sum(costs) + last_extra
    while low < high:
        middle = (low + high) // 2
        if fill(middle):
            high = middle
        else:
            low = middle + 1
    counts = fill(high)
    if counts is None:
        raise ValueError(f"{len(costs)} layers cannot be split over {parts} devices")
    return counts


def serve_script(
    plan: Plan,
    model_path_relative: str,
    recipe: Recipe,
    *,
    server_hint: str | None = None,
    python_hint: str | None = None,
    bindings_hint: str | None = None,
    lib_hint: str | None = None,
) -> str:
    """The text of serve.sh. The hints are what the build used: llama-server, or Python with llama-cpp-python."""
    chosen = plan.chosen
    counts = list(chosen.placement.layers_per_device)
    gpus = len([d for d in chosen.placement.devices if d.name not in ("RAM", "host RAM")])
    values: dict[str, Any] = {
        "context": padded_context(chosen.context) * chosen.concurrency,
        "slots": chosen.concurrency,
        "kv": chosen.kv_dtype,
        "kv_number": GGML_TYPE_NUMBERS[chosen.kv_dtype],
        "gpus": gpus,
        "needs": [-(-d.used_bytes // MIB) for d in chosen.placement.devices[: gpus or 1]],
        "gpu_layers": sum(counts) + 1 if gpus else 0,
        # llama.cpp counts the output as one more layer, on the last card
        "tensor_split": ",".join(map(str, [*counts[:-1], counts[-1] + 1])) if gpus > 1 else "",
        "batch": BATCH_TOKENS,
        "micro_batch": MICRO_BATCH_TOKENS,
        "server_hint": server_hint or "",
        "python_hint": python_hint or "python3",
        "bindings_hint": bindings_hint or "",
        "lib_hint": lib_hint or "",
    }
    return render("llamacpp.sh.j2", plan, model_path_relative, recipe, values)
