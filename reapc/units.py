"""Bytes in and out: ``24GB`` is 24e9 bytes, ``24GiB`` is 24 * 2**30; output is in binary units."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _FACTORS[f"{_letter}B"] = 1000**_power
    _FACTORS[f"{_letter}IB"] = 1024**_power

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")


def parse_bytes(text: str | int) -> int:
    """Bytes of ``"24GB"``, ``"512MiB"`` or a plain integer; ValueError says what is accepted."""
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size; write for example '24GB' or '24GiB'")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is negative; a size is zero or more bytes")
        return text
    match = _SIZE.match(str(text))
    if not match or match.group(2).upper() not in _FACTORS:
        raise ValueError(f"{text!r} is not a size; write for example '24GB' (24e9) or '24GiB' (24 * 2**30)")
    if "." in match.group(1) and match.group(2).upper() in ("", "B"):
        raise ValueError(f"{text!r} has a fraction but no unit; write for example '24.5GB' or '24.5GiB'")
    return round(float(match.group(1)) * _FACTORS[match.group(2).upper()])


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
