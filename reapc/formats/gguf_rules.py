"""Which type llama-quantize gives to a tensor: the rules of llama.cpp 0c1e57098, src/llama-quant.cpp.

The inputs are a tensor's name and shape, its place among others of its category, and five facts about the model:
architecture, layers, experts, heads per KV head and whether there is an importance matrix. See docs/gguf.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from reapc.formats.gguf_types import DEFAULT_TYPES, TYPES

Category = Literal[
    "output", "embedding", "attn_v", "attn_k", "attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down", "other"
]

# The first of these that a name contains; attn_qkv and attn_kv_b count as attn_v (their own rule is never reached).
_CATEGORIES: tuple[tuple[str, Category], ...] = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)  # fmt: skip
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

# Of two and more axes and yet never quantized.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
)  # fmt: skip
_KEPT_GLM5_NEXT = (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
    "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
    "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip
_Q8_GLM5_NEXT = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
# What the converter writes as float32 although it is a matrix (conversion/base.py, prepare_tensors).
_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d", "shortconv.conv.weight",
            ".indexer.proj.weight")  # fmt: skip

_LOW_BIT = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"})
_LOW_BIT_OUTPUT = _LOW_BIT | {"IQ3_XXS"}
_IQ2_SM = ("IQ2_S", "IQ2_M")
_EIGHT_EXPERTS_ATTN_OUTPUT_Q5 = _LOW_BIT | {
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
}  # fmt: skip
_ATTN_OUTPUT = {
    "IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S",
    "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K",
}  # fmt: skip
_ATTN_QK = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_EMBEDDING = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}


def category(name: str) -> Category:
    """The group of tensors that share a rule."""
    if name == "output.weight":
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    return next((found for part, found in _CATEGORIES if part in name), "other")


def axes(shape: tuple[int, ...]) -> int:
    """Axes as ggml counts them: leading ones (its trailing ones) do not count."""
    for place, size in enumerate(shape):
        if size > 1:
            return len(shape) - place
    return 1


def quantizes(arch: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize touches the tensor; it copies the others as the converter wrote them."""
    if not name.endswith("weight") or axes(shape) < 2 or any(part in name for part in _KEPT):
        return False
    return arch != "glm5-next" or not any(part in name for part in _KEPT_GLM5_NEXT)


def converted_type(arch: str, name: str, shape: tuple[int, ...], plain: str = "BF16", mtp: bool = False) -> str:
    """The type that the converter writes with ``--outtype`` ``plain`` (of a checkpoint in 16 bit); ``mtp``: in an MTP
    block."""
    if name.endswith("ffn_gate_tid2eid.weight"):
        return "I32"
    if mtp and arch == "nemotron_h_moe" and name.endswith("ffn_gate_inp.weight"):
        return plain  # the converter compares its name with that of another layer and misses it
    if len(shape) < 2 or not name.endswith(".weight") or any(part in name for part in _FLOAT32):
        return "F32"
    if arch == "minimax-m3" and ".indexer." in name:
        return "F32"
    if arch == "glm5-next" and any(part in name for part in ("hc_", "indexer_compressor_", "ssm_a", "ssm_dt")):
        return "F32"
    return plain


def use_more_bits(index: int, count: int) -> bool:
    """The first and the last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


@dataclass(frozen=True)
class Rules:
    """llama-quantize's choice for one file.

    ``layers`` counts all blocks, MTP included; ``values`` the attn_v tensors (attn_qkv among them); ``gqa`` is heads
    per KV head of the first layer, 0 where that has no KV heads; ``experts`` the model's one expert count.
    """

    ftype: str
    has_imatrix: bool
    arch: str
    layers: int
    values: int
    experts: int
    gqa: int
    tied: bool

    @cached_property
    def default(self) -> str:
        return DEFAULT_TYPES[self.ftype]

    @property
    def counts_downs(self) -> bool:
        """Whether ffn_down goes by a running number of such tensors and not by the layer."""
        return self.ftype in _LOW_BIT or self.experts <= 1

    def choose(self, kind: Category, name: str, columns: int, index: int, stacked: bool) -> str:
        """The type meant for a tensor that ``quantizes``; ``fallback`` may still change it.

        ``index``: the running number of attn_v tensors or of ffn_down's (``counts_downs``), else the layer.
        ``stacked``: a third axis of more than one entry.
        """
        if self.arch == "glm5-next" and any(part in name for part in _Q8_GLM5_NEXT):
            return "Q8_0"
        if kind == "output" or (kind == "embedding" and self.tied):
            return self._output(columns)
        if self.ftype == "MXFP4_MOE":
            # Every stack of matrices, MLA's attn_k_b and attn_v_b among them: only bailingmoe3 asks for experts.
            experts = self.arch != "bailingmoe3" or kind in ("ffn_up", "ffn_gate", "ffn_down")
            return "MXFP4" if stacked and experts else "Q8_0"
        match kind:
            case "embedding":
                return _EMBEDDING.get(self.ftype, self.default)
            case "attn_v":
                return self.attn_v(index)
            case "attn_k":
                if self.experts == 8:
                    return "Q4_K" if self.ftype in _LOW_BIT else "Q8_0"
                return _ATTN_QK.get(self.ftype, self.default)
            case "attn_q":
                return _ATTN_QK.get(self.ftype, self.default)
            case "attn_output":
                if self.experts == 8:
                    return "Q5_K" if self.ftype in _EIGHT_EXPERTS_ATTN_OUTPUT_Q5 else self.default
                return _ATTN_OUTPUT.get(self.ftype, self.default)
            case "ffn_down":
                return self.ffn_down(index)
            case "ffn_up" | "ffn_gate":
                return self.ffn_gate_up(index)
        return self.default

    def _output(self, columns: int) -> str:
        if self.ftype == "MXFP4_MOE" or columns % TYPES[self.default].block:
            return "Q8_0"
        if self.ftype in _LOW_BIT_OUTPUT:
            return "Q5_K"
        return "Q8_0" if self.default == "Q8_0" else "Q6_K"

    def attn_v(self, i: int) -> str:
        """``i``: how many attn_v, attn_qkv and attn_kv_b came before."""
        if self.ftype in _LOW_BIT:
            if self.gqa >= 4 or self.experts >= 4:
                return "Q4_K"
            return "IQ3_S" if self.ftype in _IQ2_SM else "Q2_K"
        if self.experts == 8:
            return "Q8_0"
        chosen = self._attn_v(i)
        if self.arch == "llama" and self.layers == 80 and self.gqa != 1 and chosen in ("Q3_K", "Q4_K"):
            return "Q5_K"  # llama.cpp takes it for a Llama 70B
        return chosen

    def _attn_v(self, i: int) -> str:
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
            case "Q4_K_M" | "Q5_K_M" if use_more_bits(i, self.values):
                return "Q6_K"
            case "Q4_K_S" if i < 4:
                return "Q5_K"
        return self.default

    def ffn_down(self, i: int) -> str:
        """``i``: the layer, or the running number where ``counts_downs``."""
        first_eighth = i < self.layers // 8
        match self.ftype:
            case ftype if ftype in _LOW_BIT:
                if first_eighth:
                    return "IQ3_S" if ftype in _IQ2_SM else "Q2_K"
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if first_eighth:
                return "Q4_K"
            case "IQ3_XXS" if not self.has_imatrix:
                return "Q4_K" if first_eighth else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if i < self.layers // 16 else "Q4_K"
            case "IQ3_M" if first_eighth or (self.experts == 8 and use_more_bits(i, self.layers)):
                return "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if use_more_bits(i, self.layers):
                return "Q6_K"
            case "IQ4_NL" | "IQ4_XS" if first_eighth and not self.has_imatrix:
                return "Q5_K"
            case "Q4_K_S" if first_eighth:
                return "Q5_K"
            case "Q4_0" | "Q5_0" if first_eighth and self.has_imatrix:
                return "Q4_1" if self.ftype == "Q4_0" else "Q5_1"
        return self.default

    def ffn_gate_up(self, i: int) -> str:
        """``i``: the layer; with one expert the running number."""
        if self.ftype == "IQ3_XS" and self.layers // 8 <= i < 7 * self.layers // 8:
            return "IQ3_XXS"
        return self.default
