"""The Plan: the whole decision, frozen, JSON in and out. Passes read it and never ask the planner."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field, model_validator

EngineName = Literal["llama.cpp", "vllm"]
HOST = "host"  # the name of the RAM beside cards
RAM = "RAM"  # the name of the RAM where there are no cards


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceBytes(_Frozen):
    """Predicted bytes on one device; ``free_bytes`` is what is left, negative when it does not fit.

    ``given`` is False for a host whose RAM nobody stated: its capacity is then what it needs.
    """

    name: str
    capacity_bytes: int
    weights_bytes: int = 0
    kv_bytes: int = 0
    state_bytes: int = 0
    workspace_bytes: int = 0
    overhead_bytes: int = 0
    given: bool = True

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        if isinstance(data, dict) and "free_bytes" in data:
            data = {key: value for key, value in data.items() if key != "free_bytes"}
        return data

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.state_bytes + self.workspace_bytes + self.overhead_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes


class Placement(_Frozen):
    """How an engine lays the model out. ``layers_per_device``: whole layers per card (llama.cpp) or per pipeline stage
    (vLLM). ``offloaded_layers``: layers whose routed experts lie in the host's RAM, the first ones. ``expert_parallel``
    is the number of ranks that whole experts are dealt to (1: experts are split like the rest). ``notes`` say what a
    user should know of this layout ("slow": a generic kernel)."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    layers_per_device: tuple[int, ...] = ()
    offloaded_layers: int = 0
    devices: tuple[DeviceBytes, ...]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return all(device.free_bytes >= 0 for device in self.devices)

    @property
    def fullest(self) -> DeviceBytes:
        """The device with the least left, of those whose memory was stated."""
        return min((d for d in self.devices if d.given), key=lambda device: device.free_bytes)


class Refusal(_Frozen):
    """A configuration that was not chosen because it is not possible, and why."""

    engine: str
    format: str
    experts: int | None = None
    reason: str


class Candidate(_Frozen):
    """One legal configuration with its predicted cost."""

    engine: EngineName
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
    decode_tokens_per_second_ceiling: float | None = None
    placement: Placement

    @property
    def fits(self) -> bool:
        return self.placement.fits

    def summary(self) -> dict[str, Any]:
        """The keys that ``fit`` and ``plan`` print for a configuration."""
        place = self.placement
        return {
            "fits": self.fits,
            "experts_kept": self.experts_kept,
            "prune_ratio": self.prune_ratio,
            "format": self.format,
            "engine": self.engine,
            "parallel": {
                "tp": place.tensor_parallel, "pp": place.pipeline_parallel, "ep": place.expert_parallel,
            },
            "layers_per_device": list(place.layers_per_device),
            "offloaded_layers": place.offloaded_layers,
            "context": self.context,
            "concurrency": self.concurrency,
            "kv_dtype": self.kv_dtype,
            "weights_bytes": self.weights_bytes,
            "kv_bytes": self.kv_bytes,
            "file_bytes": self.file_bytes,
            "bits_per_expert_weight": self.bits_per_expert_weight,
            "per_device": [device.model_dump(mode="json") for device in place.devices],
            "predicted_loss": self.predicted_loss,
            "decode_tokens_per_second_ceiling": self.decode_tokens_per_second_ceiling,
            "notes": list(place.notes),
        }  # fmt: skip


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
