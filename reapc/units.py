"""Bytes in and out: ``24GB`` is 24e9 bytes, ``24GiB`` is 24 * 2**30; output is in binary units."""

from __future__ import annotations

import re
from fractions import Fraction

_FACTORS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _FACTORS[f"{_letter}B"] = 1000**_power
    _FACTORS[f"{_letter}IB"] = 1024**_power

_SIZE = re.compile(r"([+-]?)([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_EXAMPLE = "write for example 24GB (24e9 bytes) or 24GiB (24 * 2**30)"
# Larger than any machine: a slip of the finger, not a budget.
_MOST = 10**18


def parse_bytes(written: object, *, zero: bool = True) -> int:
    """Bytes of a size as a user wrote it, in a file or on a command line: ``"24GB"``, ``"512 MiB"``, ``"7B"``.

    A unit is required, so a number from TOML or JSON is refused; bytes that the program already counted are plain
    integers and never pass through here. ``zero=False`` refuses 0 where it makes no sense. ValueError says what was
    found and what is accepted.
    """
    if isinstance(written, (int, float)) and not isinstance(written, bool):
        if written < 0:
            raise ValueError(f"{written} is negative; a size is zero or more bytes")
        raise ValueError(_no_unit(str(written)))
    if not isinstance(written, str):
        raise ValueError(f"{written!r} is not a size; {_EXAMPLE}")
    match = _SIZE.fullmatch(written.strip())
    if not match:
        raise ValueError(f"{written!r} is not a size; {_EXAMPLE}")
    sign, number, unit = match.groups()
    if sign == "-":
        raise ValueError(f"{written!r} is negative; a size is zero or more bytes")
    if not unit:
        raise ValueError(_no_unit(number))
    if unit.upper() not in _FACTORS:
        raise ValueError(f"{written!r} is not a size: {_unknown_unit(number, unit)}")
    count = Fraction(number) * _FACTORS[unit.upper()]
    if unit.upper() == "B" and count.denominator != 1:
        raise ValueError(f"{written!r} is not a size: it has a fraction of a byte; {_EXAMPLE}")
    if count > _MOST:
        raise ValueError(f"{written!r} is more than 10**18 bytes; no size in a machine is")
    if not zero and round(count) == 0:
        raise ValueError(f"{written!r} is no memory; a size of more than zero is needed here")
    return round(count)


def _no_unit(number: str) -> str:
    if "." not in number and (number == "0" or len(number) > 6):  # already a count of bytes
        return f"{number} has no unit: write the size as {number}B"
    return f"{number} has no unit: write the size as {number}GB ({number}e9 bytes) or {number}GiB ({number} * 2**30)"


def _unknown_unit(number: str, unit: str) -> str:
    letter = unit[0].upper()
    if f"{letter}B" in _FACTORS and unit.upper() in (letter, f"{letter}I"):
        return f"the unit {unit!r} is half written; write {number}{letter}B or {number}{letter}iB"
    return f"the unit {unit!r} is not known (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB); {_EXAMPLE}"


def format_bytes(count: float) -> str:
    """``count`` bytes in the binary unit that reads best, e.g. ``'11.9 MiB'``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """``seconds`` as people say it, e.g. ``'3 min 20 s'``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
