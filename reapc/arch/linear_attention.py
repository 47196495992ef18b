"""Mixers that keep a state of fixed size instead of a KV cache: gated delta net, Kimi delta attention, Mamba2.

Small projections with one row per head (beta, decay) and convolutions have no ``linears``: quantizers leave them alone,
for their few rows fit no kernel. State sizes are elements of one sequence; llama.cpp's (``llama_hparams::n_embd_r`` and
``n_embd_s``) and vLLM's (``MambaStateShapeCalculator``) are the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reapc.arch import parts
from reapc.arch.config import read, read_list
from reapc.arch.spec import GgufPart, LayerKind, Role, TensorGroup
from reapc.errors import ReapcError


@dataclass(frozen=True, slots=True)
class Mixer:
    """A recurrent mixer's tensors (its norms of the residual stream left out) and its state."""

    tensors: tuple[TensorGroup, ...]
    conv_elements: int
    recurrent_elements: int
    state_heads: int  # what a tensor-parallel size has to divide
    recurrent_dtype: str = ""  # what vLLM keeps the recurrent state in; empty: the model's own

    def layer(
        self, before: list[TensorGroup], after: list[TensorGroup] | None = None, is_moe: bool = False
    ) -> LayerKind:
        """A layer of this mixer between other tensors."""
        return LayerKind(
            (*before, *self.tensors, *(after or ())), (), is_moe, self.conv_elements, self.recurrent_elements,
            self.state_heads, self.recurrent_dtype,
        )  # fmt: skip


def small(name: str, out: int, inner: int, role: Role = "attention", gguf: str = "") -> TensorGroup:
    """A matrix ``name``.weight with one row per head: split by heads, never quantized."""
    return TensorGroup(
        f"{name}.weight", (out, inner), role, "column", None, (), (GgufPart(f"{gguf}.weight", (out, inner)),)
    )


def fixed(name: str, shape: tuple[int, ...], gguf: str, gguf_shape: tuple[int, ...], dtype: str = "") -> TensorGroup:
    """A mixer's convolution, decay or bias, split by heads, with its complete names here and in llama.cpp."""
    return TensorGroup(name, shape, "attention", "column", None, (), (GgufPart(gguf, gguf_shape),), dtype)


def layer_types(config: dict[str, Any], count: int, where: str) -> list[bool]:
    """For each layer whether it has full attention: ``layer_types``, or every ``full_attention_interval``-th (4)."""
    if config.get("layer_types") is None:
        interval = read(config, "full_attention_interval", int, where, 4)
        if interval < 1:
            raise ReapcError(f"{where}: full_attention_interval = {interval}: at least 1 is expected")
        return [(index + 1) % interval == 0 for index in range(count)]
    names = read_list(config, "layer_types", count, where)
    for name in names:
        if name not in ("linear_attention", "full_attention"):
            raise ReapcError(f"{where}: layer_types: {name!r}: linear_attention or full_attention expected")
    return [name == "full_attention" for name in names]


def gated_delta_net(
    config: dict[str, Any], hidden: int, where: str, *, fused: bool, fp32: bool, recurrent_dtype: str = ""
) -> Mixer:
    """Qwen's gated delta net under ``linear_attn``.

    ``fused``: Qwen3-Next's in_proj_qkvz and in_proj_ba, interleaved by key head, of which the converter makes attn_qkv,
    attn_gate and ssm_ba; otherwise Qwen3.5's in_proj_qkv, _z, _b and _a. ``fp32``: A_log and norm are stored so.
    """
    key_heads = read(config, "linear_num_key_heads", int, where)
    value_heads = read(config, "linear_num_value_heads", int, where)
    key_dim = read(config, "linear_key_head_dim", int, where) * key_heads
    value_head_dim = read(config, "linear_value_head_dim", int, where)
    kernel = read(config, "linear_conv_kernel_dim", int, where)
    if value_heads % key_heads:
        raise ReapcError(
            f"{where}: linear_num_value_heads = {value_heads} is not a multiple of linear_num_key_heads = {key_heads}"
        )
    value_dim = value_heads * value_head_dim
    channels = 2 * key_dim + value_dim
    dtype = "float32" if fp32 else ""
    p = "linear_attn"
    if fused:
        rows = channels + value_dim
        halves = (GgufPart("attn_qkv.weight", (channels, hidden)), GgufPart("attn_gate.weight", (value_dim, hidden)))
        inputs = [
            TensorGroup(
                f"{p}.in_proj_qkvz.weight", (rows, hidden), "attention", "column", None, ((rows, hidden),), halves
            ),
            small(f"{p}.in_proj_ba", 2 * value_heads, hidden, gguf="ssm_ba"),
        ]
    else:
        inputs = [
            parts.linear(f"{p}.in_proj_qkv", channels, hidden, "attention", "column", "attn_qkv"),
            parts.linear(f"{p}.in_proj_z", value_dim, hidden, "attention", "column", "attn_gate"),
            small(f"{p}.in_proj_b", value_heads, hidden, gguf="ssm_beta"),
            small(f"{p}.in_proj_a", value_heads, hidden, gguf="ssm_alpha"),
        ]
    tensors = (
        *inputs,
        fixed(f"{p}.conv1d.weight", (channels, 1, kernel), "ssm_conv1d.weight", (channels, kernel)),
        fixed(f"{p}.dt_bias", (value_heads,), "ssm_dt.bias", (value_heads,)),
        fixed(f"{p}.A_log", (value_heads,), "ssm_a", (value_heads,), dtype),
        parts.vector(f"{p}.norm.weight", value_head_dim, gguf="ssm_norm.weight", dtype=dtype),
        parts.linear(f"{p}.out_proj", hidden, value_dim, "attention", "row", "ssm_out"),
    )
    # A rank holds whole key heads with all their value heads.
    recurrent = value_dim * (key_dim // key_heads)
    return Mixer(tensors, (kernel - 1) * channels, recurrent, key_heads, recurrent_dtype)


def kda(
    prefix: str, hidden: int, heads: int, head_dim: int, kernel: int, *, full_rank_gate: bool, a_log: tuple[int, ...],
    gguf_a: tuple[int, ...], fp32_conv: bool,
) -> Mixer:  # fmt: skip
    """Kimi delta attention under ``prefix`` ("self_attn"); vLLM keeps its recurrent state in float32.

    ``a_log`` is the shape of A_log as stored, ``gguf_a`` what the converter makes of it. ``full_rank_gate``: g_proj
    instead of the pair g_a_proj, g_b_proj. ``fp32_conv``: convolutions and o_norm are stored in float32.
    """
    width = heads * head_dim
    dtype = "float32" if fp32_conv else ""

    def column(name: str, out: int, inner: int, gguf: str) -> TensorGroup:
        return parts.linear(f"{prefix}.{name}", out, inner, "attention", "column", gguf)

    def low(name: str, gguf: str) -> TensorGroup:
        return parts.linear(f"{prefix}.{name}", head_dim, hidden, "attention", "replicate", gguf)

    gate = [low("g_a_proj", "ssm_g_a"), column("g_b_proj", width, head_dim, "ssm_g_b")]
    if full_rank_gate:
        gate = [column("g_proj", width, hidden, "ssm_g")]
    tensors = (
        *(column(f"{n}_proj", width, hidden, f"attn_{n}") for n in "qkv"),
        *(
            fixed(
                f"{prefix}.{n}_conv1d.weight",
                (width, 1, kernel),
                f"ssm_conv1d_{n}.weight",
                (1, width, 1, kernel),
                dtype,
            )
            for n in "qkv"
        ),
        low("f_a_proj", "ssm_f_a"),
        column("f_b_proj", width, head_dim, "ssm_f_b"),
        fixed(f"{prefix}.dt_bias", (width,), "ssm_dt.bias", (width,), "float32"),
        fixed(f"{prefix}.A_log", a_log, "ssm_a", gguf_a, "float32"),
        small(f"{prefix}.b_proj", heads, hidden, gguf="ssm_beta"),
        *gate,
        parts.vector(f"{prefix}.o_norm.weight", head_dim, gguf="ssm_norm.weight", dtype=dtype),
        parts.linear(f"{prefix}.o_proj", hidden, width, "attention", "row", "attn_output"),
    )
    return Mixer(tensors, 3 * (kernel - 1) * width, width * head_dim, heads, "float32")


def mamba2(config: dict[str, Any], hidden: int, where: str) -> Mixer:
    """Nemotron-H's Mamba2 under ``mixer``; in_proj's rows are gate, x, B, C and dt."""
    heads = read(config, "mamba_num_heads", int, where)
    inner = heads * read(config, "mamba_head_dim", int, where)
    state = read(config, "ssm_state_size", int, where)
    groups = read(config, "n_groups", int, where)
    kernel = read(config, "conv_kernel", int, where)
    if heads % groups:
        raise ReapcError(f"{where}: mamba_num_heads = {heads} is not a multiple of n_groups = {groups}")
    channels = inner + 2 * groups * state
    rows = inner + channels + heads
    tensors = [
        parts.linear("mixer.in_proj", rows, hidden, "attention", "column", "ssm_in"),
        fixed("mixer.conv1d.weight", (channels, 1, kernel), "ssm_conv1d.weight", (channels, kernel)),
        fixed("mixer.dt_bias", (heads,), "ssm_dt.bias", (heads,)),
        fixed("mixer.A_log", (heads,), "ssm_a", (heads, 1)),
        fixed("mixer.D", (heads,), "ssm_d", (heads, 1)),
        TensorGroup(
            "mixer.norm.weight", (inner,), "norm", "column", None, (),
            (GgufPart("ssm_norm.weight", (groups, inner // groups)),),
        ),
        parts.linear("mixer.out_proj", hidden, inner, "attention", "row", "ssm_out"),
    ]  # fmt: skip
    if read(config, "use_conv_bias", bool, where, True):
        tensors.append(fixed("mixer.conv1d.bias", (channels,), "ssm_conv1d.bias", (channels,)))
    if read(config, "use_bias", bool, where, False):
        tensors += [
            parts.vector("mixer.in_proj.bias", rows, "attention", "column", "ssm_in.bias"),
            parts.vector("mixer.out_proj.bias", hidden, "attention", "replicate", "ssm_out.bias"),
        ]
    # vLLM splits B and C by groups, and refuses ranks that these do not divide into (mamba_mixer2.py).
    dtype = read(config, "mamba_ssm_cache_dtype", str, where, "")
    return Mixer(tuple(tensors), (kernel - 1) * channels, inner * state, groups if groups > 1 else heads, dtype)
