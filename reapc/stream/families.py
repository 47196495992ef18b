"""Which families the streamed pass computes, and where their experts lie, read from the ModelSpec.

A family stands here once its layers are known to take nothing from one another but the hidden states, and to call
their experts module with (hidden, chosen indices, gate weights). Others are refused by name, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

from reapc.arch import ModelSpec
from reapc.arch.spec import LayerKind
from reapc.errors import CannotBeDone

SUPPORTED = ("glm4_moe", "qwen3_moe")
_PARTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")  # llama.cpp's names of the three


def check_family(spec: ModelSpec, where: str) -> None:
    """CannotBeDone unless models of this family can be observed and pruned."""
    if spec.family not in SUPPORTED:
        raise CannotBeDone(
            f"{where}: {spec.model_type} models cannot be observed or pruned in this version",
            hint=f"families that can: {', '.join(SUPPORTED)}; `reapc plan` and `reapc fit` know more",
        )


@dataclass(frozen=True)
class ExpertNames:
    """``module``: the experts' place in a layer ("mlp.experts"). ``gate``, ``up``, ``down``: an expert's three
    tensors as stored, after the layer's prefix, the expert's number written ``{e}``."""

    module: str
    gate: str
    up: str
    down: str

    @property
    def parts(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


def expert_names(kind: LayerKind) -> ExpertNames:
    """Where the experts of a layer lie; CannotBeDone where they are not three matrices each."""
    stored = {part.name: group.name for group in kind.tensors if group.role == "expert" for part in group.gguf}
    names = [stored.get(part, "") for part in _PARTS]
    modules = {name.split(".{e}.")[0] for name in names}
    if set(stored) != set(_PARTS) or len(set(names)) != 3 or len(modules) != 1 or not all("{e}" in n for n in names):
        raise CannotBeDone(f"experts stored as {sorted(set(stored.values()))} cannot be observed in this version")
    return ExpertNames(modules.pop(), *names)
