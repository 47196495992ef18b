"""What a build is expected to need before it starts: seconds, disk and memory. An estimate, and called one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from reapc.allocate.needs import Needs
from reapc.checkpoint.reader import Checkpoint
from reapc.choice.samples import disk_tokens, forward_tokens
from reapc.observe.observe import disk_bytes
from reapc.plan import Plan
from reapc.prune.heal import SWEEPS
from reapc.prune.heal_sides import disk_bytes as heal_bytes
from reapc.quantize import worker
from reapc.quantize.gguf_view import view_bytes
from reapc.stream.run import TOKENS_PER_BATCH
from reapc.stream.tokens import Tokens
from reapc.units import format_bytes, format_seconds

# Shares of a large matrix product's rate that passes reach; measured on the demo model, two cores.
_FORWARD_EFFICIENCY = 0.35
_COPY_BYTES_PER_SECOND = 300e6
_QUANTIZE_WEIGHTS_PER_SECOND_AND_CORE = 4e6
_BASE_MEMORY_BYTES = 600 << 20
# AutoRound tunes a layer on batches of up to 8 sequences of 512 tokens: forward and backward are three forwards.
_TUNED_TOKENS, _TUNED_FORWARDS = 4096, 3
# GPTQ: seconds per weight and core of the column by column rounding; measured on the demo model, two cores.
_GPTQ_WEIGHTS_PER_SECOND_AND_CORE = 0.5e6
# Healing in plain forwards, both models' layers and the sweeps: 4.6 to 5.8 measured by benchmarks/heal.py.
_HEALING_FORWARDS = 6


@dataclass(frozen=True)
class Estimate:
    """``seconds``, ``disk_bytes`` (stages and result together) and ``memory_bytes`` (peak of one pass)."""

    seconds: float
    disk_bytes: int
    memory_bytes: int

    def describe(self) -> str:
        return (
            f"about {format_seconds(self.seconds)}, {format_bytes(self.disk_bytes)} of disk, "
            f"{format_bytes(self.memory_bytes)} of memory"
        )


def _matmul_rate() -> float:
    """FLOP per second of a matrix product on this machine, timed for a few milliseconds."""
    a = np.ones((512, 512), np.float32)
    a @ a
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.05:
        a @ a
        count += 1
    return 2 * 512**3 * count / (time.perf_counter() - start)


def estimate(
    checkpoint: Checkpoint, plan: Plan, calibration: Tokens, held_out: Tokens, tool: str = "", iters: int = 0,
    decoded: bool = False, healed: bool = False, measured: bool = False, healed_quantized: bool = False,
    allocation: Needs | None = None,
) -> Estimate:  # fmt: skip
    """The needs of a build of ``plan``: two observations, a verification, the copies between, and the quantizer.
    ``tool`` writes a vLLM format ("" where none is written), AutoRound with ``iters`` steps per layer. ``decoded``: the
    pruned checkpoint is written in 16 bit once more. ``healed``: it is refitted to the original; ``healed_quantized``:
    the quantized result is. ``measured``: the criterion is chosen by measuring candidates. ``allocation``: what
    allocating needs."""
    spec, chosen = checkpoint.spec, plan.chosen
    active = spec.active_parameters
    tokens = 2 * calibration.count + 2 * held_out.count
    quantized = chosen.engine == "llama.cpp" and chosen.format not in ("BF16", "F16")
    pruned_spec = spec.with_experts(chosen.experts_kept)
    share = pruned_spec.parameters / spec.parameters
    pruned_bytes = round(checkpoint.bytes * share) if chosen.experts_kept < spec.num_experts else 0
    base_bytes = 2 * pruned_spec.parameters * ((chosen.engine == "llama.cpp") + decoded)
    seconds = 2 * active * tokens / (_matmul_rate() * _FORWARD_EFFICIENCY) + 10
    seconds += (2 * checkpoint.bytes + pruned_bytes + base_bytes + chosen.file_bytes) / _COPY_BYTES_PER_SECOND
    if quantized:
        seconds += pruned_spec.parameters / (_QUANTIZE_WEIGHTS_PER_SECOND_AND_CORE * (os.cpu_count() or 1))
    memory = 0
    if tool == "auto-round":
        seconds += 2 * active * _TUNED_TOKENS * _TUNED_FORWARDS * iters / (_matmul_rate() * _FORWARD_EFFICIENCY)
    elif tool == "gptqmodel":
        seconds += pruned_spec.parameters / (_GPTQ_WEIGHTS_PER_SECOND_AND_CORE * (os.cpu_count() or 1))
    if tool in ("auto-round", "gptqmodel"):
        memory = worker.needed_bytes(pruned_spec, tool)
        seconds += 2 * active * 2 * calibration.count / (_matmul_rate() * _FORWARD_EFFICIENCY)
    if measured:
        seconds += 2 * active * forward_tokens(spec, calibration) / (_matmul_rate() * _FORWARD_EFFICIENCY)
    if allocation:
        seconds += 2 * active * allocation.tokens / (_matmul_rate() * _FORWARD_EFFICIENCY)
        seconds += allocation.copied_bytes / _COPY_BYTES_PER_SECOND + allocation.rounding
    healed_bytes = 0
    sides = heal_bytes(calibration, spec.hidden_size, spec.top_k, spec.expert_intermediate_size)
    healing_seconds = _HEALING_FORWARDS * 2 * active * calibration.count / (_matmul_rate() * _FORWARD_EFFICIENCY)
    if healed:
        seconds += healing_seconds
        healed_bytes = 2 * 2 * pruned_spec.parameters + sides  # the healed layers, then the healed checkpoint
    if healed_quantized:
        # the down projections are rounded at every turn, as the quantizer rounds
        downs = len(spec.moe_layers) * chosen.experts_kept * spec.expert_intermediate_size * spec.hidden_size
        seconds += healing_seconds
        seconds += SWEEPS * downs / (_QUANTIZE_WEIGHTS_PER_SECOND_AND_CORE * (os.cpu_count() or 1))
        before = 2 * pruned_spec.parameters if healed else 0
        quantized_bytes = 2 * chosen.file_bytes + view_bytes(pruned_spec)  # the healed layers, then the healed result
        healed_bytes = max(healed_bytes, before + quantized_bytes + sides)
    reference = 4 * held_out.input_ids.size * min(spec.vocab_size, 512)
    copies = pruned_bytes + healed_bytes + base_bytes + chosen.file_bytes
    states = disk_bytes(checkpoint, calibration, held_out)
    if measured:  # after the observation, which has removed its own
        states = max(states, disk_bytes(checkpoint, calibration, None) * disk_tokens(calibration) // calibration.count)
    if allocation and chosen.engine == "llama.cpp":  # its files go before anything is pruned, but for the first
        copies = max(copies + 2 * spec.parameters, allocation.disk_bytes)
    elif allocation:
        states = max(states, allocation.disk_bytes)
    disk = states + reference + copies
    layer = max(
        sum(group.unit_parameters * (3 if group.role == "expert" else 1) for group in layer.kind.tensors)
        for layer in spec.layers
    )
    head = spec.vocab_size * (spec.hidden_size + 3 * 2048)  # the head in fp32 and the log-probabilities of a part
    batch = TOKENS_PER_BATCH * (spec.hidden_size * 12 + spec.expert_intermediate_size * 4)
    return Estimate(seconds, round(disk * 1.05), max(memory, _BASE_MEMORY_BYTES + 4 * max(layer + batch, head)))
