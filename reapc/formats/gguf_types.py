"""GGUF's storage types, and the file types that llama-quantize can write (its ``--help``)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from reapc.errors import CannotBeDone, ReapcError
from reapc.schema import nearest

ALIGNMENT_BYTES = 32


@dataclass(frozen=True, slots=True)
class GgufType:
    """A storage type: ``block`` elements take ``block_bytes``; ``fallback`` is for rows that blocks do not divide.

    Without a fallback llama-quantize takes F16, or fails where the block is larger than 32.
    """

    block: int
    block_bytes: int
    fallback: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


TYPES: dict[str, GgufType] = {
    "F32": GgufType(1, 4),
    "I32": GgufType(1, 4),
    "BF16": GgufType(1, 2),
    "F16": GgufType(1, 2),
    "Q8_0": GgufType(32, 34),
    "Q6_K": GgufType(256, 210, fallback="Q8_0"),
    "Q5_K": GgufType(256, 176, fallback="Q5_1"),
    "Q5_1": GgufType(32, 24),
    "Q5_0": GgufType(32, 22),
    "Q4_K": GgufType(256, 144, fallback="Q5_0"),
    "Q4_1": GgufType(32, 20),
    "Q4_0": GgufType(32, 18),
    "IQ4_NL": GgufType(32, 18),
    "NVFP4": GgufType(64, 36),  # only the converter writes it
    "MXFP4": GgufType(32, 17),
    "IQ4_XS": GgufType(256, 136, fallback="IQ4_NL"),
    "Q3_K": GgufType(256, 110, fallback="Q4_0"),
    "IQ3_S": GgufType(256, 110, fallback="IQ4_NL"),
    "IQ3_XXS": GgufType(256, 98, fallback="IQ4_NL"),
    "Q2_K": GgufType(256, 84, fallback="Q4_0"),
    "IQ2_S": GgufType(256, 82, fallback="IQ4_NL"),
    "IQ2_XS": GgufType(256, 74, fallback="IQ4_NL"),
    "Q2_0": GgufType(64, 18, fallback="Q4_0"),
    "IQ2_XXS": GgufType(256, 66, fallback="IQ4_NL"),
    "TQ2_0": GgufType(256, 66, fallback="Q4_0"),
    "IQ1_M": GgufType(256, 56, fallback="IQ4_NL"),
    "TQ1_0": GgufType(256, 54, fallback="Q4_0"),
    "IQ1_S": GgufType(256, 50, fallback="IQ4_NL"),
    "Q1_0": GgufType(128, 18),
}

# What a file of each name stores by default; the rules raise or lower single tensors.
DEFAULT_TYPES = {
    "F32": "F32", "BF16": "BF16", "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1", "Q5_0": "Q5_0", "Q4_1": "Q4_1", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "MXFP4_MOE": "MXFP4",
    "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q4_0": "Q4_0", "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K",
    "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS", "IQ2_XS": "IQ2_XS", "Q2_0": "Q2_0", "IQ2_XXS": "IQ2_XXS",
    "TQ2_0": "TQ2_0", "TQ1_0": "TQ1_0", "IQ1_M": "IQ1_M", "IQ1_S": "IQ1_S", "Q1_0": "Q1_0",
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
NEEDS_IMATRIX = frozenset({"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
# The converter alone writes these; llama-quantize has no part in it.
UNQUANTIZED = frozenset({"F32", "BF16", "F16"})


def check_format(ftype: str) -> str:
    """The canonical spelling of ``ftype``; ReapcError names the nearest known one."""
    name = ftype.upper()
    name = ALIASES.get(name, name)
    if name not in DEFAULT_TYPES:
        raise ReapcError(
            f"unknown GGUF format {ftype!r}", hint=f"{nearest(name, DEFAULT_TYPES)}known: {', '.join(DEFAULT_TYPES)}"
        )
    return name


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; its rows must be whole blocks."""
    kind = TYPES[type_name]
    if shape and shape[-1] % kind.block:
        raise ReapcError(f"a row of {shape[-1]} elements is not a multiple of {type_name}'s block of {kind.block}")
    return prod(shape) // kind.block * kind.block_bytes


def fallback(type_name: str, columns: int) -> str:
    """The type that llama-quantize takes for rows of ``columns`` elements where ``type_name`` was meant.

    CannotBeDone where it gives up (Q1_0: blocks of 128 and nothing below them).
    """
    kind = TYPES[type_name]
    if columns % kind.block == 0:
        return type_name
    if kind.fallback is None and kind.block > 32:
        raise CannotBeDone(
            f"llama-quantize has no substitute for {type_name} where rows have {columns} elements: a multiple of "
            f"{kind.block} is expected"
        )
    other = kind.fallback or "F16"
    return other if columns % TYPES[other].block == 0 else "F16"


def padded(count: int) -> int:
    """Bytes that ``count`` bytes of one tensor take in the file."""
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
