"""GGUF: the types, and which type llama-quantize gives to every tensor of a Qwen3-MoE model.

Rules: llama.cpp 0c1e57098, src/llama-quant.cpp (facts/llamacpp-quantize-rules.md). Bytes are exact: tests compare every
tensor with the real tool. Shapes are (..., out, in), as numpy reads them; the row is the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import NamedTuple

from reapc.arch import ModelSpec
from reapc.errors import ReapcError
from reapc.schema import nearest

ALIGNMENT_BYTES = 32


@dataclass(frozen=True)
class GgufType:
    """A storage type: ``block`` elements take ``block_bytes``; ``fallback`` is for rows that blocks do not divide."""

    block: int
    block_bytes: int
    needs_imatrix: bool = False
    fallback: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


TYPES: dict[str, GgufType] = {
    "F32": GgufType(1, 4),
    "BF16": GgufType(1, 2),
    "F16": GgufType(1, 2),
    "Q8_0": GgufType(32, 34, fallback="F16"),
    "Q6_K": GgufType(256, 210, fallback="Q8_0"),
    "Q5_K": GgufType(256, 176, fallback="Q5_1"),
    "Q5_1": GgufType(32, 24, fallback="F16"),
    "Q5_0": GgufType(32, 22, fallback="F16"),
    "Q4_K": GgufType(256, 144, fallback="Q5_0"),
    "Q4_1": GgufType(32, 20, fallback="F16"),
    "Q4_0": GgufType(32, 18, fallback="F16"),
    "IQ4_NL": GgufType(32, 18, fallback="F16"),
    "IQ4_XS": GgufType(256, 136, fallback="IQ4_NL"),
    "Q3_K": GgufType(256, 110, fallback="Q4_0"),
    "IQ3_S": GgufType(256, 110, fallback="IQ4_NL"),
    "IQ3_XXS": GgufType(256, 98, True, "IQ4_NL"),
    "Q2_K": GgufType(256, 84, fallback="Q4_0"),
    "IQ2_S": GgufType(256, 82, True, "IQ4_NL"),
    "IQ2_XS": GgufType(256, 74, True, "IQ4_NL"),
    "IQ2_XXS": GgufType(256, 66, True, "IQ4_NL"),
    "IQ1_M": GgufType(256, 56, True, "IQ4_NL"),
    "IQ1_S": GgufType(256, 50, True, "IQ4_NL"),
}

# What a file of each name stores by default; the rules below raise or lower single tensors.
DEFAULT_TYPES = {
    "BF16": "BF16", "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q4_0": "Q4_0",
    "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K", "IQ3_M": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_XS": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS",
    "IQ2_XS": "IQ2_XS", "IQ2_XXS": "IQ2_XXS", "IQ1_M": "IQ1_M", "IQ1_S": "IQ1_S",
}  # fmt: skip
NEEDS_IMATRIX = frozenset({"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})

_LOW_BIT = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"})
_LOW_BIT_OUTPUT = _LOW_BIT | {"IQ3_XXS"}
_EIGHT_EXPERTS_ATTN_OUTPUT_Q5 = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"}
)
_EMBEDDING = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
}


class GgufTensor(NamedTuple):
    """One tensor of the file: its name, its shape (row last) and its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def data_bytes(self) -> int:
        """Bytes in memory, without the padding between tensors."""
        return tensor_bytes(self.type, self.shape)


def check_format(ftype: str) -> str:
    """The canonical spelling of ``ftype``; ReapcError names the nearest known one."""
    name = ftype.upper()
    if name not in DEFAULT_TYPES:
        raise ReapcError(
            f"unknown GGUF format {ftype!r}", hint=f"{nearest(name, DEFAULT_TYPES)}known: {', '.join(DEFAULT_TYPES)}"
        )
    return name


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; its rows must be whole blocks."""
    kind = TYPES[type_name]
    if shape[-1] % kind.block:
        raise ReapcError(f"a row of {shape[-1]} elements is not a multiple of {type_name}'s block of {kind.block}")
    return prod(shape) // kind.block * kind.block_bytes


def _use_more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _fallback(type_name: str, columns: int) -> str:
    """The type that llama-quantize takes for rows of ``columns`` elements where ``type_name`` was meant."""
    if columns % TYPES[type_name].block == 0:
        return type_name
    other = TYPES[type_name].fallback or "F16"
    return other if columns % TYPES[other].block == 0 else "F16"


@dataclass(frozen=True)
class _Rules:
    """llama-quantize's choice for one file: the model's numbers and the file's name."""

    ftype: str
    has_imatrix: bool
    layers: int
    experts: int
    gqa: int

    @property
    def default(self) -> str:
        return DEFAULT_TYPES[self.ftype]

    def output(self, columns: int) -> str:
        if columns % TYPES[self.default].block:
            return "Q8_0"
        if self.ftype in _LOW_BIT_OUTPUT:
            return "Q5_K"
        return "Q8_0" if self.default == "Q8_0" else "Q6_K"

    def attn_v(self, i: int) -> str:
        if self.ftype in _LOW_BIT:
            if self.gqa >= 4 or self.experts >= 4:
                return "Q4_K"
            return "IQ3_S" if self.ftype in ("IQ2_S", "IQ2_M") else "Q2_K"
        if self.experts == 8:
            return "Q8_0"
        match self.ftype:
            case "Q2_K":
                return "Q4_K" if self.gqa >= 4 else "Q3_K"
            case "IQ3_XXS" if self.gqa < 4:
                return "IQ3_XXS" if self.has_imatrix else "IQ3_S"
            case "Q2_K_S" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S" if self.gqa >= 4:
                return "Q4_K"
            case "IQ3_M":
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if self.gqa >= 4:
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _use_more_bits(i, self.layers):
                return "Q6_K"
            case "Q4_K_S" if i < 4:
                return "Q5_K"
        return self.default

    def attn_k(self) -> str:
        if self.experts == 8:
            return "Q4_K" if self.ftype in _LOW_BIT else "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.ftype, self.default)

    def attn_q(self) -> str:
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.ftype, self.default)

    def attn_output(self) -> str:
        if self.experts == 8:
            raised = self.ftype in _LOW_BIT or self.ftype in _EIGHT_EXPERTS_ATTN_OUTPUT_Q5
            return "Q5_K" if raised else self.default
        bumps = {
            "IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "Q2_K": "Q3_K",
            "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K",
        }  # fmt: skip
        return bumps.get(self.ftype, self.default)

    def ffn_down(self, i: int, count: int) -> str:
        """``i`` is the layer; ``count`` the running number of ffn_down tensors (the IQ1/IQ2 rule uses that)."""
        first_eighth = i < self.layers // 8
        match self.ftype:
            case ftype if ftype in _LOW_BIT:
                if count < self.layers // 8:
                    return "IQ3_S" if ftype in ("IQ2_S", "IQ2_M") else "Q2_K"
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if first_eighth:
                return "Q4_K"
            case "IQ3_XXS" if not self.has_imatrix:
                return "Q4_K" if first_eighth else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if i < self.layers // 16 else "Q4_K"
            case "IQ3_M" if first_eighth or (self.experts == 8 and _use_more_bits(i, self.layers)):
                return "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _use_more_bits(i, self.layers):
                return "Q6_K"
            case "IQ4_NL" | "IQ4_XS" if first_eighth and not self.has_imatrix:
                return "Q5_K"
            case "Q4_K_S" if first_eighth:
                return "Q5_K"
            case "Q4_0" if first_eighth and self.has_imatrix:
                return "Q4_1"
        return self.default

    def ffn_gate_up(self, i: int) -> str:
        if self.ftype == "IQ3_XS" and self.layers // 8 <= i < 7 * self.layers // 8:
            return "IQ3_XXS"
        return self.default


def _rule(rules: _Rules, name: str, columns: int, layer: int, downs: int, order: int, tied: bool) -> str:
    """The type that the rules give to the matrix ``name``; ``order`` counts attn_v tensors before it."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return rules.output(columns)
    if name == "token_embd.weight":
        return _EMBEDDING.get(rules.ftype, rules.default)
    part = name.split(".")[2]
    match part:
        case "attn_v":
            return rules.attn_v(order)
        case "attn_k":
            return rules.attn_k()
        case "attn_q":
            return rules.attn_q()
        case "attn_output":
            return rules.attn_output()
        case "ffn_down" | "ffn_down_exps":
            return rules.ffn_down(layer, downs)
    return rules.ffn_gate_up(layer)


def _matrices(spec: ModelSpec) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and layer (-1 outside) of every tensor of two or more axes, and of the norms."""
    hidden, width, experts = spec.hidden_size, spec.expert_intermediate_size, spec.num_experts
    q, kv, dense = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.dense_intermediate_size
    found: list[tuple[str, tuple[int, ...], int]] = [
        ("token_embd.weight", (spec.vocab_size, hidden), -1),
        ("output_norm.weight", (hidden,), -1),
    ]
    if not spec.tied_embeddings:
        found.append(("output.weight", (spec.vocab_size, hidden), -1))
    for layer in spec.layers:
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
            "attn_output": (hidden, q), "attn_q_norm": (spec.head_dim,), "attn_k_norm": (spec.head_dim,),
            "ffn_norm": (hidden,),
        }  # fmt: skip
        if layer.is_moe:
            shapes["ffn_gate_inp"] = (experts, hidden)
            shapes["ffn_gate_exps"] = shapes["ffn_up_exps"] = (experts, width, hidden)
            shapes["ffn_down_exps"] = (experts, hidden, width)
        else:
            shapes["ffn_gate"] = shapes["ffn_up"] = (dense, hidden)
            shapes["ffn_down"] = (hidden, dense)
        found += [(f"blk.{layer.index}.{part}.weight", shape, layer.index) for part, shape in shapes.items()]
        biases = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
        for tensor in takewhile(lambda t: t.expert is None, layer.tensors):  # thousands of experts have no bias
            if tensor.name.endswith(".bias") and (part := biases.get(tensor.module.rsplit(".", 1)[-1])):
                found.append((f"blk.{layer.index}.{part}.bias", tensor.shape, layer.index))
    return found


def tensor_types(spec: ModelSpec, ftype: str, has_imatrix: bool) -> list[GgufTensor]:
    """Every tensor of the GGUF that llama-quantize writes for ``ftype``, with its exact type."""
    rules = _Rules(ftype, has_imatrix, spec.num_layers, spec.num_experts, spec.num_heads // spec.num_kv_heads)
    # llama-quantize walks the tensors in the order of a map keyed by layer, then name: attn_v is layer by layer.
    downs = values = 0
    result = []
    for name, shape, layer in _matrices(spec):
        if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
            result.append(GgufTensor(name, shape, "F32"))
            continue
        if ftype in ("BF16", "F16"):
            result.append(GgufTensor(name, shape, ftype))
            continue
        kind = _rule(rules, name, shape[-1], layer, downs, values, spec.tied_embeddings)
        downs += ".ffn_down" in name
        values += ".attn_v." in name
        result.append(GgufTensor(name, shape, _fallback(kind, shape[-1])))
    return result


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def weights_bytes(spec: ModelSpec, ftype: str, has_imatrix: bool) -> int:
    """Bytes of the tensor data in the file, exact: every tensor is padded to 32 bytes."""
    return sum(_padded(tensor.data_bytes) for tensor in tensor_types(spec, ftype, has_imatrix))


def expert_bits(tensors: list[GgufTensor]) -> float:
    """Mean bits per weight of the experts' matrices."""
    experts = [tensor for tensor in tensors if "_exps." in tensor.name]
    return 8 * sum(t.data_bytes for t in experts) / sum(prod(t.shape) for t in experts)


def file_overhead_bytes(spec: ModelSpec, ftype: str = "BF16", tokenizer_bytes: int | None = None) -> int:
    """Bytes of a GGUF before its tensor data: tensor table (exact but for the order), metadata and tokenizer.

    ``tokenizer_bytes``: what the token and merge strings take in the file. Without it the tokenizer is an ESTIMATE
    from the vocabulary: 8 + 6.5 bytes and a 4-byte type per token, 8 + 8.5 bytes per merge, one merge per token
    (not checked against a real Qwen3 file). The other metadata is taken as 4 KiB plus a chat template of 6 KiB.
    """
    table = sum(8 + len(t.name) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensor_types(spec, ftype, True))
    tokenizer = tokenizer_bytes if tokenizer_bytes is not None else round(35 * spec.vocab_size)
    return _padded(24 + table + tokenizer + 10 * 1024)
