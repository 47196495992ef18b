"""Consecutive layers over devices."""

from __future__ import annotations


def fill(costs: list[int], parts: int, first: int, last: int, room: int) -> list[int] | None:
    """Layers per part, consecutive and at least one each, with no part above ``room`` bytes: every part takes what it
    can, so None means that there is no such split. ``first`` and ``last`` bytes lie on the outer parts besides."""
    counts, index = [], 0
    for part in range(parts):
        left = room - (first if part == 0 else 0) - (last if part == parts - 1 else 0)
        count = 0
        while index < len(costs) - (parts - 1 - part) and costs[index] <= left:
            left -= costs[index]
            index += 1
            count += 1
        if not count:
            return None
        counts.append(count)
    return counts if index == len(costs) else None
