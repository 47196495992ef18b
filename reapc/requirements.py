"""What a recipe asks of a checkpoint that is at hand: the plan from its own format, and what a build needs for it."""

from __future__ import annotations

from collections.abc import Callable

from reapc.checkpoint.reader import Checkpoint
from reapc.formats.gguf_types import UNQUANTIZED
from reapc.formats.weights import WeightFormat, parse
from reapc.plan import Candidate, Plan
from reapc.planner.search import make_plan
from reapc.probes import Host, available_ram
from reapc.prune.stored import stored_format
from reapc.quantize import checkpoint as quantizer
from reapc.quantize.folder_form import FolderForm
from reapc.recipe import Recipe
from reapc.toolchain import require


class Requirements:
    """A recipe and the checkpoint that its model is."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint) -> None:
        self.recipe = recipe
        self.checkpoint = checkpoint
        self.stored = stored_format(checkpoint, mtp=recipe.prune.mtp == "prune")

    def plan(self, measured: Callable[[int], float] | None = None) -> Plan:
        """The plan of what a build can write; ``measured``: the loss of pruning to a count, from scores."""
        spec, source = self.checkpoint.spec, self.recipe.model.source
        return make_plan(self.recipe, spec, source, measured, buildable=True, stored=self.stored)

    def copies(self, chosen: Candidate) -> bool:
        """Whether the result's tensors are the checkpoint's own bytes."""
        return chosen.engine == "vllm" and self.stored is not None and chosen.format == self.stored.name

    def written(self, chosen: Candidate) -> WeightFormat | None:
        """The format that a quantizer has to write for vLLM; None where nothing is quantized for it."""
        fmt = parse(chosen.format) if chosen.engine == "vllm" and not self.copies(chosen) else None
        return fmt if fmt is not None and fmt.quantized else None

    def decodes(self, chosen: Candidate) -> bool:
        """Whether the checkpoint has to be decoded to 16 bit first. llama.cpp's converter reads FP8 in tiles and
        gpt-oss's MXFP4 itself."""
        quantization = self.checkpoint.quantization
        if quantization is None or self.copies(chosen):
            return False
        if self.heals(chosen):
            return True
        if chosen.engine == "vllm" or quantization.method == "mxfp4":
            return chosen.engine == "vllm"
        fused = any(linear.experts for linear in self.checkpoint.packed.values())
        return quantization.method != "fp8" or "weight_block_size" not in quantization.config or fused

    def measures(self, chosen: Candidate) -> bool:
        """Whether the criterion is chosen by measuring candidates: method "auto", where anything is pruned."""
        return self.recipe.prune.method == "auto" and chosen.experts_kept < self.checkpoint.spec.num_experts

    def heals(self, chosen: Candidate) -> bool:
        """Whether the pruned checkpoint is refitted to the original. CannotBeDone where the result keeps the
        checkpoint's own packing, and refitted weights cannot be written in it."""
        if not self.recipe.prune.heal or chosen.experts_kept == self.checkpoint.spec.num_experts:
            return False
        if self.checkpoint.quantization is not None and self.copies(chosen):
            FolderForm(self.checkpoint)
        return True

    def heals_quantized(self, chosen: Candidate) -> bool:
        """Whether the quantized result is refitted to the original."""
        if not self.recipe.quantize.heal:
            return False
        return chosen.format not in UNQUANTIZED if chosen.engine == "llama.cpp" else self.written(chosen) is not None

    def check_tools(self, chosen: Candidate) -> dict[str, str]:
        """Whatever the plan's quantizer needs is looked for before anything is computed; versions of its packages."""
        self.heals(chosen)
        if chosen.engine == "llama.cpp":
            for tool in ("convert", "quantize", "lib_dir"):
                require(tool)
            return {}
        fmt = self.written(chosen)
        if fmt is None:
            return {}
        spec = self.checkpoint.spec
        writer = quantizer.writer_for(fmt, self.recipe.quantize.writer, spec)
        versions = quantizer.versions(writer)
        quantizer.require_memory(spec.with_experts(chosen.experts_kept), writer, available_ram(Host(), []))
        return versions
