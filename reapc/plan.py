"""The Plan: the whole decision, frozen, JSON in and out. Passes read it and never ask the planner."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceBytes(_Frozen):
    """Predicted bytes on one device; ``free_bytes`` is what is left, negative when it does not fit."""

    name: str
    capacity_bytes: int
    weights_bytes: int
    kv_bytes: int
    state_bytes: int = 0
    workspace_bytes: int
    overhead_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.state_bytes + self.workspace_bytes + self.overhead_bytes

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes


class Placement(_Frozen):
    """How an engine lays the model out."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    layers_per_device: tuple[int, ...] = ()
    devices: tuple[DeviceBytes, ...]


class Refusal(_Frozen):
    """A configuration that was not chosen because it is not possible, and why."""

    engine: str
    format: str
    experts: int | None = None
    reason: str


class Candidate(_Frozen):
    """One legal configuration with its predicted cost."""

    engine: Literal["llama.cpp", "vllm"]
    format: str
    experts_kept: int
    prune_ratio: float
    context: int
    concurrency: int
    kv_dtype: str
    file_bytes: int
    weights_bytes: int
    kv_bytes: int
    bits_per_expert_weight: float
    predicted_loss: float
    placement: Placement

    @property
    def fits(self) -> bool:
        return all(device.free_bytes >= 0 for device in self.placement.devices)


class Plan(_Frozen):
    """The chosen candidate, its reasons, the runners-up and the refused."""

    model: str
    family: str
    target: str
    num_experts: int
    top_k: int
    criterion: str
    chosen: Candidate
    loss_source: str
    reasons: tuple[str, ...]
    runners_up: tuple[Candidate, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; ``Plan.model_validate`` reads it back."""
        return self.model_dump(mode="json")
