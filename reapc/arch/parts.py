"""Pieces that families share: attention, MLPs and experts as tensor groups, with what llama.cpp makes of them."""

from __future__ import annotations

from collections.abc import Iterable

from reapc.arch.spec import CacheStream, GgufPart, LayerKind, LayerSpec, Parallel, Role, TensorGroup


def linear(
    name: str, out: int, inner: int, role: Role, parallel: Parallel = "replicate", gguf: str = ""
) -> TensorGroup:
    """A linear layer's matrix ``name``.weight (out, inner); ``gguf`` is its name there, without ``.weight``."""
    part = (GgufPart(f"{gguf}.weight", (out, inner)),) if gguf else ()
    return TensorGroup(f"{name}.weight", (out, inner), role, parallel, None, ((out, inner),), part)


def vector(
    name: str, size: int, role: Role = "norm", parallel: Parallel = "replicate", gguf: str = "", dtype: str = ""
) -> TensorGroup:
    """A vector with its complete name (norm, bias); never quantized. ``gguf`` is its complete name there."""
    return TensorGroup(name, (size,), role, parallel, None, (), (GgufPart(gguf, (size,)),) if gguf else (), dtype)


def gqa(
    prefix: str, hidden: int, heads: int, kv_heads: int, head_dim: int, *, v_head_dim: int = 0, bias: bool = False,
    output_bias: bool | None = None, qk_norm: int = 0, k_norm: int | None = None, gated: bool = False,
) -> list[TensorGroup]:  # fmt: skip
    """Grouped-query attention under ``prefix`` ("self_attn"): q, k, v, o, biases and the q and k norms.

    ``qk_norm`` is the size of the q norm (0: none), ``k_norm`` of the k norm where it differs; ``output_bias`` is
    that of o where it differs from ``bias``; ``gated`` doubles q's rows (the output gate is fused into q).
    """
    v_dim = v_head_dim or head_dim
    q = heads * head_dim * (2 if gated else 1)
    k, v, o = kv_heads * head_dim, kv_heads * v_dim, heads * v_dim
    groups = [
        linear(f"{prefix}.q_proj", q, hidden, "attention", "column", "attn_q"),
        linear(f"{prefix}.k_proj", k, hidden, "attention", "kv", "attn_k"),
        linear(f"{prefix}.v_proj", v, hidden, "attention", "kv", "attn_v"),
        linear(f"{prefix}.o_proj", hidden, o, "attention", "row", "attn_output"),
    ]
    if bias:
        groups += [
            vector(f"{prefix}.q_proj.bias", q, "attention", "column", "attn_q.bias"),
            vector(f"{prefix}.k_proj.bias", k, "attention", "kv", "attn_k.bias"),
            vector(f"{prefix}.v_proj.bias", v, "attention", "kv", "attn_v.bias"),
        ]
    if bias if output_bias is None else output_bias:
        groups.append(vector(f"{prefix}.o_proj.bias", hidden, "attention", "replicate", "attn_output.bias"))
    if qk_norm:
        groups += [
            vector(f"{prefix}.q_norm.weight", qk_norm, gguf="attn_q_norm.weight"),
            vector(f"{prefix}.k_norm.weight", k_norm or qk_norm, gguf="attn_k_norm.weight"),
        ]
    return groups


def gqa_cache(kv_heads: int, head_dim: int, v_head_dim: int = 0, window: int | None = None) -> CacheStream:
    """The cache of grouped-query attention; ``window`` in tokens for sliding attention."""
    return CacheStream(kv_heads * head_dim, kv_heads * (v_head_dim or head_dim), kv_heads, window)


def mla(
    prefix: str, hidden: int, heads: int, kv_lora: int, nope: int, rope: int, v_head_dim: int, q_lora: int | None,
) -> list[TensorGroup]:  # fmt: skip
    """Multi-head latent attention (DeepSeek): a latent of ``kv_lora`` and one shared rope key of ``rope`` elements.

    llama.cpp's converter splits kv_b_proj into attn_k_b (heads, kv_lora, nope) and attn_v_b (heads, v_head_dim,
    kv_lora).
    """
    q_rows = heads * (nope + rope)
    groups = []
    if q_lora:
        groups += [
            linear(f"{prefix}.q_a_proj", q_lora, hidden, "attention", "replicate", "attn_q_a"),
            vector(f"{prefix}.q_a_layernorm.weight", q_lora, gguf="attn_q_a_norm.weight"),
            linear(f"{prefix}.q_b_proj", q_rows, q_lora, "attention", "column", "attn_q_b"),
        ]
    else:
        groups.append(linear(f"{prefix}.q_proj", q_rows, hidden, "attention", "column", "attn_q"))
    kv_rows = heads * (nope + v_head_dim)
    kv_b = TensorGroup(
        f"{prefix}.kv_b_proj.weight", (kv_rows, kv_lora), "attention", "column", None, ((kv_rows, kv_lora),),
        (
            GgufPart("attn_k_b.weight", (heads, kv_lora, nope)),
            GgufPart("attn_v_b.weight", (heads, v_head_dim, kv_lora)),
        ),
    )  # fmt: skip
    groups += [
        linear(f"{prefix}.kv_a_proj_with_mqa", kv_lora + rope, hidden, "attention", "replicate", "attn_kv_a_mqa"),
        vector(f"{prefix}.kv_a_layernorm.weight", kv_lora, gguf="attn_kv_a_norm.weight"),
        kv_b,
        linear(f"{prefix}.o_proj", hidden, heads * v_head_dim, "attention", "row", "attn_output"),
    ]
    return groups


def mla_cache(kv_lora: int, rope: int) -> CacheStream:
    """The latent and the rope key: one entry a token, whole on every tensor-parallel rank."""
    return CacheStream(kv_lora + rope, 0, 0, None, 1, "latent")


def mlp(prefix: str, hidden: int, width: int, role: Role = "dense_mlp", gguf_suffix: str = "") -> list[TensorGroup]:
    """gate, up and down of a gated MLP under ``prefix``; ``gguf_suffix`` is "" or "_shexp"."""
    return [
        linear(f"{prefix}.gate_proj", width, hidden, role, "column", f"ffn_gate{gguf_suffix}"),
        linear(f"{prefix}.up_proj", width, hidden, role, "column", f"ffn_up{gguf_suffix}"),
        linear(f"{prefix}.down_proj", hidden, width, role, "row", f"ffn_down{gguf_suffix}"),
    ]


def router(name: str, hidden: int, dtype: str = "") -> TensorGroup:
    """The router's matrix (experts, hidden) with its complete name; never quantized."""
    return TensorGroup(
        name, (hidden,), "router", "replicate", 0, (), (GgufPart("ffn_gate_inp.weight", (hidden,), True),), dtype
    )


def router_bias(name: str, dtype: str = "float32", gguf: str = "exp_probs_b.bias") -> TensorGroup:
    """The router's bias (experts,), for choosing or added to the logits, with its complete name."""
    return TensorGroup(name, (), "router", "replicate", 0, (), (GgufPart(gguf, (), True),) if gguf else (), dtype)


def experts(
    prefix: str, hidden: int, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[TensorGroup]:
    """Gated experts stored one by one under ``prefix``.{e}: (width, hidden) gate and up, (hidden, width) down."""
    gate, up, down = names

    def group(name: str, out: int, inner: int, gguf: str, parallel: Parallel = "expert") -> TensorGroup:
        part = GgufPart(f"{gguf}.weight", (out, inner), True)
        return TensorGroup(
            f"{prefix}.{{e}}.{name}.weight", (out, inner), "expert", parallel, None, ((out, inner),), (part,)
        )

    return [
        group(gate, width, hidden, "ffn_gate_exps"),
        group(up, width, hidden, "ffn_up_exps"),
        group(down, hidden, width, "ffn_down_exps", "expert_row"),
    ]


def fused_experts(prefix: str, hidden: int, width: int, *, transposed: bool = False) -> list[TensorGroup]:
    """Gated experts in two tensors, ``prefix``.gate_up_proj (E, 2 width, hidden) and .down_proj (E, hidden, width);
    ``transposed``: (E, hidden, 2 width) and (E, width, hidden)."""
    up, down = (2 * width, hidden), (hidden, width)
    gate_up_parts = tuple(GgufPart(f"ffn_{n}_exps.weight", (width, hidden), True) for n in ("gate", "up"))
    return [
        TensorGroup(
            f"{prefix}.gate_up_proj", up[::-1] if transposed else up, "expert", "expert", 0,
            ((width, hidden), (width, hidden)), gate_up_parts,
        ),
        TensorGroup(
            f"{prefix}.down_proj", down[::-1] if transposed else down, "expert", "expert_row", 0, (down,),
            (GgufPart("ffn_down_exps.weight", down, True),),
        ),
    ]  # fmt: skip


def outer(
    hidden: int, vocab: int, tied: bool, *, prefix: str = "model.", head: str = "lm_head.weight"
) -> tuple[TensorGroup, ...]:
    """Input embedding, final norm and head. A tied head is not on disk, and the converter writes none."""
    groups = [
        TensorGroup(
            f"{prefix}embed_tokens.weight", (vocab, hidden), "embedding", "vocab", None, (),
            (GgufPart("token_embd.weight", (vocab, hidden)),),
        ),
        vector(f"{prefix}norm.weight", hidden, gguf="output_norm.weight"),
    ]  # fmt: skip
    if not tied:
        part = (GgufPart("output.weight", (vocab, hidden)),)
        groups.append(TensorGroup(head, (vocab, hidden), "lm_head", "vocab", None, (), part))
    return tuple(groups)


def stack(prefix: str, kinds: Iterable[LayerKind], start: int = 0) -> tuple[LayerSpec, ...]:
    """Layers ``prefix``.0, .1, ... of these kinds (numbering on disk from ``start``)."""
    return tuple(LayerSpec(i, f"{prefix}.{i}", kind) for i, kind in enumerate(kinds, start))
