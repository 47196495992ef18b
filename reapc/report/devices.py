"""Devices as people name them: equal ones together."""

from __future__ import annotations

from collections.abc import Sequence

from reapc.plan import DeviceBytes


def equal_devices(devices: Sequence[DeviceBytes]) -> list[list[DeviceBytes]]:
    """Devices with the same parts and capacity, together."""
    groups: dict[tuple[int, ...], list[DeviceBytes]] = {}
    for d in devices:
        parts = (d.weights_bytes, d.kv_bytes, d.state_bytes, d.workspace_bytes, d.overhead_bytes)
        groups.setdefault((d.capacity_bytes, *parts), []).append(d)
    return list(groups.values())


def names_of(group: Sequence[DeviceBytes]) -> str:
    """ "RTX 3090 1 .. 6", or "RTX 3090 1, 3, 4" where they do not follow each other."""
    first = group[0].name
    if len(group) == 1:
        return first
    numbers = [device.name.rsplit(" ", 1)[-1] for device in group]
    follow = all(n.isdigit() for n in numbers) and int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
    return f"{first} .. {numbers[-1]}" if follow else ", ".join([first, *numbers[1:]])
