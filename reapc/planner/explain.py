"""A plan in words and tables: the decision, the bytes of every device, the alternatives and the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reapc.arch import ModelSpec
from reapc.engines import llamacpp, vllm
from reapc.formats import gguf
from reapc.plan import Candidate, Plan
from reapc.recipe import Recipe
from reapc.units import format_bytes

Line = tuple[str, int, str]


def _candidate_row(candidate: Candidate, total: int) -> tuple[str, ...]:
    return (
        candidate.engine,
        candidate.format,
        f"{candidate.experts_kept} of {total}",
        f"{candidate.bits_per_expert_weight:.2f}",
        format_bytes(candidate.file_bytes),
        f"{candidate.predicted_loss:.4f}",
    )


def render_plan(plan: Plan) -> RenderableType:
    """The whole plan for a terminal. Names are shown as they are: no markup is read from them."""
    chosen = plan.chosen
    decision = Table(title="Decision", title_justify="left", show_header=False)
    for key, value in (
        ("model", f"{plan.model} ({plan.num_experts} experts, top-{plan.top_k})"),
        ("target", plan.target),
        ("engine, format", f"{chosen.engine}, {chosen.format}"),
        ("experts kept", f"{chosen.experts_kept} of {plan.num_experts} (prune ratio {chosen.prune_ratio:.3f})"),
        ("context", f"{chosen.context} tokens x {chosen.concurrency}, KV cache {chosen.kv_dtype}"),
        ("file", format_bytes(chosen.file_bytes)),
        ("predicted KL", f"{chosen.predicted_loss:.4f} nats per token ({plan.loss_source})"),
    ):
        decision.add_row(Text(key), Text(value))
    devices = Table(title="Bytes per device", title_justify="left")
    for column in ("device", "weights", "KV", "workspace", "overhead", "sum", "capacity", "free"):
        devices.add_column(column, justify="left" if column == "device" else "right")
    for d in chosen.placement.devices:
        parts = (d.weights_bytes, d.kv_bytes + d.state_bytes, d.workspace_bytes, d.overhead_bytes)
        cells = [format_bytes(n) for n in (*parts, d.used_bytes, d.capacity_bytes, d.free_bytes)]
        devices.add_row(Text(d.name), *cells)
    blocks: list[RenderableType] = [decision, *(Text(f"- {reason}") for reason in plan.reasons), devices]
    if plan.runners_up:
        others = Table(title="Runners-up", title_justify="left")
        for column in ("engine", "format", "experts", "bits per expert weight", "file", "predicted KL"):
            others.add_column(column)
        for candidate in plan.runners_up:
            others.add_row(*_candidate_row(candidate, plan.num_experts))
        blocks.append(others)
    if plan.refused:
        refused = Table(title="Refused", title_justify="left")
        for column in ("engine", "format", "reason"):
            refused.add_column(column)
        for refusal in plan.refused:
            refused.add_row(refusal.engine, refusal.format, Text(refusal.reason))
        blocks.append(refused)
    return Group(*blocks)


def _gguf_lines(tensors: list[gguf.GgufTensor]) -> Iterator[Line]:
    groups: dict[tuple[str, str], tuple[int, int]] = {}
    for tensor in tensors:
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else tensor.name.removesuffix(".weight")
        elements, size = groups.get((part, tensor.type), (0, 0))
        groups[part, tensor.type] = (elements + prod(tensor.shape), size + tensor.data_bytes)
    for (part, kind), (elements, size) in groups.items():
        entry = gguf.TYPES[kind]
        yield f"{part} {kind}", size, f"{elements} weights / {entry.block} * {entry.block_bytes} bytes"


def arithmetic(plan: Plan, spec: ModelSpec, recipe: Recipe) -> list[Line]:
    """Lines (name, bytes, formula) behind the plan: the weights by kind, then what each device adds."""
    chosen = plan.chosen
    pruned = spec.with_experts(chosen.experts_kept)
    lines: list[Line] = []
    if chosen.engine == "llama.cpp":
        lines += _gguf_lines(gguf.tensor_types(pruned, chosen.format, recipe.quantize.imatrix))
        block, size = llamacpp.KV_TYPES[chosen.kv_dtype]
        cells = llamacpp.padded_context(chosen.context) * chosen.concurrency
        kv = f"{cells} cells * elements per token / {block} * {size} bytes, over the layers of the device"
        workspace = f"attention mask and activations of {llamacpp.MICRO_BATCH_TOKENS} tokens, an upper bound"
        overhead = "CUDA context, cuBLAS: llama.cpp's --fit-target default"
        ram = f"llama-server itself (measured) + {llamacpp.TOKENIZER_BYTES_PER_TOKEN} bytes * {spec.vocab_size} tokens"
    else:
        for role, count in pruned.parameters_by_role().items():
            lines.append((f"{role} bf16", 2 * count, f"{count} weights * 2 bytes"))
        kv = f"{chosen.context} tokens in blocks of {vllm.BLOCK_TOKENS}, KV heads of the card, {chosen.kv_dtype}"
        workspace = f"activations of {vllm.MAX_BATCHED_TOKENS} tokens, a model of vLLM's dummy forward"
        overhead = f"CUDA graphs, NCCL (estimate) and the {1 - vllm.GPU_MEMORY_UTILIZATION:.0%} that vLLM leaves free"
        ram = overhead
    for device in chosen.placement.devices:
        lines += [
            (f"{device.name}: weights", device.weights_bytes, "the tensors placed on it"),
            (f"{device.name}: KV cache", device.kv_bytes, kv),
            (f"{device.name}: workspace", device.workspace_bytes, workspace),
            (f"{device.name}: overhead", device.overhead_bytes, ram if "RAM" in device.name else overhead),
        ]
    return lines


def render_arithmetic(lines: list[Line]) -> RenderableType:
    """The arithmetic as a table."""
    table = Table(title="Arithmetic", title_justify="left")
    for column in ("what", "bytes", "formula"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for name, size, formula in lines:
        table.add_row(Text(name), f"{size:,}", Text(formula))
    return table
