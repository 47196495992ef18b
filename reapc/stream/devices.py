"""The devices and the dtype that a pass computes on."""

from __future__ import annotations

import torch

from reapc.errors import CannotBeDone, ReapcError


def compute_settings(
    device: str = "auto", dtype: str = "auto", stored: str = "bfloat16", *, several: bool = False
) -> tuple[str, torch.dtype]:
    """Device and dtype of a pass: fp32 on a CPU, on a GPU the dtype that the model is ``stored`` in. ``several``: the
    device may be a list (see ``devices_of``)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    devices = devices_of(device)
    if len(devices) > 1 and not several:
        raise ReapcError(f"device {device!r}: one device is expected here", hint=f"--device {devices[0]}")
    if dtype == "auto":
        dtype = "float32" if devices[0].type == "cpu" else stored
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ReapcError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    return device, found


def devices_of(text: str) -> list[torch.device]:
    """The devices of a list such as "cuda:0,cuda:1": layers take turns on them. ReapcError where one is not understood,
    CannotBeDone where it is not there."""
    devices = [_device(name.strip(), text) for name in text.split(",")]
    if len({device.type for device in devices}) > 1:
        raise ReapcError(f"device {text!r}: the devices of a list must be of one kind", hint="GPUs only, or cpu alone")
    return devices


def _device(name: str, text: str) -> torch.device:
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise ReapcError(
            f"device {text!r}: {name!r} is not one of cpu, cuda, cuda:N", hint="several: --device cuda:0,cuda:1"
        )
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotBeDone(f"device {text!r}: torch sees no GPU here", hint="--device cpu")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise CannotBeDone(f"device {text!r}: {name} is not there; torch sees cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", int(number or 0))
