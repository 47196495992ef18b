"""The numbers behind a plan: which tensors have which format, and the arithmetic of every device, with formulas."""

from __future__ import annotations

from math import prod
from typing import Any

from reapc.engines import llamacpp, vllm, vllm_rules
from reapc.engines.cache import kv_kind
from reapc.errors import ReapcError
from reapc.formats import gguf, gguf_sizes, weights
from reapc.formats.gguf_types import TYPES
from reapc.plan import HOST, RAM, Candidate, Plan
from reapc.planner import prior
from reapc.planner.question import Question
from reapc.planner.search import loss_method, router_cost

Line = tuple[str, int, str]


def tensor_groups(chosen: Candidate, question: Question) -> list[dict[str, Any]]:
    """The format of every group of tensors: name, format, tensors, weights (a count) and bytes."""
    spec = question.spec
    pruned = spec.with_experts(chosen.experts_kept)
    groups: dict[tuple[str, str], list[int]] = {}

    def add(name: str, kind: str, count: int, elements: int, size: int) -> None:
        row = groups.setdefault((name, kind), [0, 0, 0])
        for i, amount in enumerate((count, elements, size)):
            row[i] += amount

    if chosen.engine == "llama.cpp":
        for tensor in gguf.tensor_types(pruned, chosen.format, question.imatrix):
            name = tensor.name.removesuffix(".weight")
            part = name.split(".", 2)[2] if name.startswith("blk.") else name
            add(part, tensor.type, 1, prod(tensor.shape), tensor.data_bytes)
    else:
        fmt = question.format(chosen.format)
        assert fmt is not None
        for group, layer, layers in weights.placed_groups(fmt, pruned):
            stored = fmt.at(group, layer)
            kind = stored.name if stored else (group.dtype or "bf16")
            each = chosen.experts_kept if "{e}" in group.name else 1
            size = weights.group_bytes(fmt, group, chosen.experts_kept, layer) * layers
            add(group.role, kind, each * layers, group.parameters(chosen.experts_kept) * layers, size)
        if spec.vision_parameters:
            add("vision", "bf16", 0, spec.vision_parameters, 2 * spec.vision_parameters)
    return [
        {"group": name, "format": kind, "tensors": count, "weights": elements, "bytes": size}
        for (name, kind), (count, elements, size) in groups.items()
    ]


SIZED = ("bf16", "fp8", "auto-round-w4g128", "auto-round-w3g128", "Q4_K_M", "Q3_K_M")


def size_table(question: Question, kept: int) -> list[dict[str, Any]]:
    """Weights in a few formats with all experts, with a quarter and half of them pruned, and with ``kept``: what a
    projection by parameters times bits misses (scales, embeddings, head and router in 16 bit) is in."""
    spec = question.spec
    total = spec.num_experts
    counts = sorted({total, total - total // 4, total - total // 2, kept}, reverse=True)
    rows = []
    for name in SIZED:
        fmt = weights.parse(name)
        if fmt is None and spec.gguf_arch is None:
            continue
        if fmt is not None and weights.misfit(fmt, spec):
            continue
        for count in counts:
            if fmt is None:
                size = gguf_sizes.sizes(spec, name, question.imatrix).tensors_bytes(count)
            else:
                size = weights.checkpoint_bytes(fmt, spec.with_experts(count))
            rows.append({"format": name, "experts": count, "bytes": size})
    return rows


def plan_json(plan: Plan, question: Question) -> dict[str, Any]:
    """What ``reapc plan --json`` prints: the plan as one result of ``fit``, with experts and tensors; the alternatives;
    every refusal."""
    spec, chosen = question.spec, plan.chosen
    return {
        "plan": {
            "model": plan.model,
            "family": plan.family,
            "target": plan.target,
            **chosen.summary(),
            "experts": {
                "count": spec.num_experts,
                "kept": chosen.experts_kept,
                "top_k": spec.top_k,
                "shared": spec.shared_experts,
                "groups": spec.n_group,
                "moe_layers": len(spec.moe_layers),
            },
            "criterion": plan.criterion,
            "tensors": tensor_groups(chosen, question),
            "sizes": size_table(question, chosen.experts_kept),
            "loss_source": plan.loss_source,
            "reasons": list(plan.reasons),
        },
        "alternatives": [candidate.summary() for candidate in plan.runners_up],
        "refused": [refusal.model_dump(mode="json") for refusal in plan.refused],
    }


def arithmetic(plan: Plan, question: Question) -> list[Line]:
    """Lines (name, bytes, formula) behind the plan: the weights by kind, then what each device adds up to."""
    chosen = plan.chosen
    lines: list[Line] = []
    for row in tensor_groups(chosen, question):
        lines.append((f"{row['group']} {row['format']}", row["bytes"], _weights_formula(row, chosen)))
    kv, workspace, overhead, ram = _formulas(chosen, question)
    for device in chosen.placement.devices:
        if not device.used_bytes:
            lines.append((f"{device.name}: idle", 0, "nothing is placed on it"))
            continue
        lines += [
            (f"{device.name}: weights", device.weights_bytes, _placed(device.name, chosen)),
            (f"{device.name}: KV cache", device.kv_bytes, kv),
        ]
        if device.state_bytes:
            lines.append((f"{device.name}: state", device.state_bytes, _state_formula(chosen)))
        lines += [
            (f"{device.name}: workspace", device.workspace_bytes, workspace),
            (f"{device.name}: overhead", device.overhead_bytes, ram if device.name in (HOST, RAM) else overhead),
            (f"{device.name}: free", device.free_bytes, f"capacity {device.capacity_bytes} - the sum of the above"),
        ]
    return lines


def _weights_formula(row: dict[str, Any], chosen: Candidate) -> str:
    if chosen.engine == "llama.cpp":
        kind = TYPES[row["format"]]
        return f"{row['weights']} weights / {kind.block} * {kind.block_bytes} bytes"
    try:
        fmt = weights.parse(row["format"])
    except ReapcError:  # of a checkpoint that is kept as it is: a group size that no writer has
        fmt = None
    if fmt is None or not fmt.quantized:
        return f"{row['weights']} weights * {row['bytes'] / max(row['weights'], 1):g} bytes"
    scales = f"groups of {fmt.group_size}" if fmt.group_size else "channels"
    return f"{row['weights']} weights at {fmt.bits} bits, and the scales of {scales} ({fmt.name} in formats/weights.py)"


def _placed(device: str, chosen: Candidate) -> str:
    place = chosen.placement
    if device == HOST:
        offloaded = (
            f", the routed experts of the first {place.offloaded_layers} layers" if place.offloaded_layers else ""
        )
        return f"the token embeddings{offloaded}"
    if chosen.engine == "vllm":
        return (
            f"its share at TP {place.tensor_parallel}, PP {place.pipeline_parallel}, EP {place.expert_parallel}; "
            f"stages of {', '.join(map(str, place.layers_per_device))} layers"
        )
    return f"whole layers, {', '.join(map(str, place.layers_per_device))} per card; the output matrix on the last"


def _state_formula(chosen: Candidate) -> str:
    element = "float32" if chosen.engine == "llama.cpp" else "convolution in 16 bit, recurrent state as configured"
    return f"state of the linear-attention layers, {element}, * {chosen.concurrency} sequences"


def _formulas(chosen: Candidate, question: Question) -> tuple[str, str, str, str]:
    spec = question.spec
    kind = kv_kind(spec)
    if chosen.engine == "llama.cpp":
        entry = llamacpp.KV_TYPES[chosen.kv_dtype]
        cells = llamacpp.padded_context(chosen.context) * chosen.concurrency
        kv = (
            f"{kind}: {cells} cells (fewer on sliding layers) * elements of a token / {entry['block']} * "
            f"{entry['bytes']} bytes, over the device's layers"
        )
        workspace = (
            f"attention masks (a sparse indexer's scores and choices too), activations of "
            f"{llamacpp.MICRO_BATCH_TOKENS} tokens; logits (vocabulary "
            f"{spec.vocab_size} * {llamacpp.MICRO_BATCH_TOKENS} * 4) on the output device: an upper bound"
        )
        overhead = "CUDA context, cuBLAS: llama.cpp's --fit-target default"
        ram = "llama-server itself (measured), its tokenizer (300 bytes a token); beside cards, CUDA's staging buffers"
        return kv, workspace, overhead, ram
    size = vllm_rules.KV_TYPES[chosen.kv_dtype]["bytes"]
    kv = (
        f"{kind}: {chosen.context} tokens in blocks of {vllm.BLOCK_TOKENS}, * {chosen.concurrency} sequences, {size} "
        "bytes an element; KV heads are split over TP, latents are not"
    )
    workspace = f"activations of {vllm.MAX_BATCHED_TOKENS} tokens: a model of vLLM's dummy forward, not measured"
    overhead = (
        f"CUDA graphs, NCCL (estimate) and the {1 - vllm.utilization(question.target):.0%} of the card that "
        "--gpu-memory-utilization leaves"
    )
    return kv, workspace, overhead, overhead


def loss_lines(plan: Plan, question: Question) -> list[tuple[str, float, str]]:
    """Lines (part, KL in nats per token, where it comes from) that add up to the predicted loss."""
    chosen = plan.chosen
    method = loss_method(chosen.engine, chosen.format)
    prune = question.prune_loss(chosen.experts_kept)
    rest = chosen.predicted_loss - prune
    kv = prior.kv_loss(chosen.kv_dtype)
    router = router_cost(question.spec, chosen.engine, chosen.experts_kept)
    source = "the scores of this model" if plan.loss_source == "measured" else prior.source_of("pruning")
    return [
        (f"{chosen.format}, {chosen.bits_per_expert_weight:.2f} bits", rest - kv - router, prior.source_of(method)),
        (f"prune ratio {chosen.prune_ratio:.3f}", prune, source),
        (f"KV cache {chosen.kv_dtype}", kv, "prior.toml [kv]"),
        ("router without the fused kernel", router, "prior.toml [router]"),
    ]
