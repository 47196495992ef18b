"""What decoders with grouped-query attention share: the numbers every config states, and the ModelSpec made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read
from reapc.arch.spec import CacheStream, GgufPart, LayerKind, ModelSpec, TensorGroup
from reapc.errors import CannotBeDone, ReapcError


@dataclass(frozen=True)
class Decoder:
    """The numbers of a decoder, read from its config."""

    config: dict[str, Any]
    where: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    count: int
    vocab: int
    experts: int
    expert_keys: tuple[str, ...]
    tied: bool

    def number(self, key: str, default: int | None = None) -> int:
        """A count under ``key``; one that has a default may be 0, but not less."""
        if default is None:
            return read(self.config, key, int, self.where)
        value = read(self.config, key, int, self.where, default)
        if value < 0:
            raise ReapcError(f"{self.where}: {key} = {value}: 0 or more expected")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The bool under ``key``."""
        return read(self.config, key, bool, self.where, default)

    def refuse(self, key: str, what: str) -> None:
        """Refuses a config that turns ``key`` on; ``what`` it would be that no code here describes."""
        if self.config.get(key):
            raise CannotBeDone(f"{self.where}: {key} = {self.config[key]!r}: {what} is not supported")

    def layer(
        self, attention: Iterable[TensorGroup], mlp: Iterable[TensorGroup], *, is_moe: bool = True,
        norms: tuple[str, str] = ("attn_norm", "ffn_norm"), norm_bias: bool = False, window: int | None = None,
    ) -> LayerKind:  # fmt: skip
        """A layer with a norm before attention and one before the MLP; ``norms`` are their names in GGUF. ``window``:
        tokens that its attention keeps (None: all)."""
        before, after = (
            [
                parts.vector(f"{name}.{kind}", self.hidden, gguf=f"{gguf}.{kind}")
                for kind in (("weight", "bias") if norm_bias else ("weight",))
            ]
            for name, gguf in zip(("input_layernorm", "post_attention_layernorm"), norms, strict=True)
        )
        cache: tuple[CacheStream, ...] = (parts.gqa_cache(self.kv_heads, self.head_dim, window=window),)
        return LayerKind((*before, *attention, *after, *mlp), cache, is_moe=is_moe)

    def attention(self, **options: Any) -> list[TensorGroup]:
        """``parts.gqa`` under ``self_attn``."""
        return parts.gqa("self_attn", self.hidden, self.heads, self.kv_heads, self.head_dim, **options)

    def window(self) -> int | None:
        """``sliding_window`` of all layers, where it is set."""
        return self.number("sliding_window", 0) or None

    def spec(self, *, kinds: Iterable[LayerKind], width: int, prefix: str = "model.", **fields: Any) -> ModelSpec:
        """The ModelSpec: layers of ``kinds`` under ``prefix`` + "layers", experts ``width`` wide; ``fields`` are its
        other fields, and those that the config does not state in the usual way."""
        if "top_k" not in fields:
            fields["top_k"] = self.number("num_experts_per_tok")
        usual: dict[str, Any] = {
            "dense_intermediate_size": 0,
            "max_context": read(self.config, "max_position_embeddings", int, self.where, 4096),
            "dtype": dtype_of(self.config),
            "outer": parts.outer(self.hidden, self.vocab, self.tied, prefix=prefix),
            "quantization": self.config.get("quantization_config"),
        }
        return ModelSpec(
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_experts=self.experts,
            expert_intermediate_size=width,
            tied_embeddings=self.tied,
            expert_count_keys=self.expert_keys,
            layers=parts.stack(f"{prefix}layers", kinds),
            **(usual | fields),
        )


def decoder(
    config: dict[str, Any], where: str, expert_keys: tuple[str, ...], *, tied: bool | None = None,
    key_prefix: str = "", equal_heads: bool = False, own_head_dim: bool = False,
) -> Decoder:  # fmt: skip
    """The numbers of ``config``; ReapcError names a key that is missing, wrong or contradicted.

    ``tied``: whether embedding and head are one, where another part of the config says so; None: this one does, or they
    are two. ``equal_heads``: as many KV heads as heads where the config gives none (what a class's default of null
    means); the other classes' defaults are one model's number, so the key must be there. ``own_head_dim``: likewise
    for head_dim, which elsewhere is hidden_size / num_attention_heads unless given.
    """
    experts, keys = expert_count(config, where, expert_keys, key_prefix)
    hidden = read(config, "hidden_size", int, where)
    heads = read(config, "num_attention_heads", int, where)
    if config.get("head_dim") is None and not own_head_dim and hidden % heads:
        raise ReapcError(
            f"{where}: hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}, and there is no "
            "head_dim"
        )
    return Decoder(
        config=config,
        where=where,
        hidden=hidden,
        heads=heads,
        kv_heads=read(config, "num_key_value_heads", int, where, **({"default": heads} if equal_heads else {})),
        head_dim=read(config, "head_dim", int, where, **({} if own_head_dim else {"default": hidden // heads})),
        count=read(config, "num_hidden_layers", int, where),
        vocab=read(config, "vocab_size", int, where),
        experts=experts,
        expert_keys=keys,
        tied=read(config, "tie_word_embeddings", bool, where, False) if tied is None else tied,
    )


def qwen_layers(d: Decoder, attention: list[TensorGroup], moe: list[TensorGroup]) -> tuple[list[LayerKind], int]:
    """The layers of a Qwen model and the width of its dense MLPs (0 where it states none): every
    ``decoder_sparse_step``-th layer has experts, but those in ``mlp_only_layers``."""
    step = read(d.config, "decoder_sparse_step", int, d.where, 1)
    if step < 1:
        raise ReapcError(f"{d.where}: decoder_sparse_step = {step}: at least 1 expected")
    dense = read(d.config, "mlp_only_layers", list, d.where, [])
    if wrong := [i for i in dense if not isinstance(i, int) or not 0 <= i < d.count]:
        raise ReapcError(f"{d.where}: mlp_only_layers names layer {wrong[0]!r}, and the model has {d.count} layers")
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(d.count)]
    width = d.number("intermediate_size", 0) if all(sparse) else d.number("intermediate_size")
    kinds = {True: d.layer(attention, moe)}
    kinds[False] = d.layer(attention, parts.mlp("mlp", d.hidden, width), is_moe=False)
    return [kinds[has] for has in sparse], width


def rope_parameters(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Rope scaling: ``rope_parameters`` (transformers 5) or ``rope_scaling``, its kind always under "rope_type"."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    found = read(config, key, dict, where, {})
    return {**found, "rope_type": found.get("rope_type") or found.get("type") or "default"}


def rope_freqs(d: Decoder) -> tuple[GgufPart, ...]:
    """What llama.cpp's converter adds for rope of type "llama3" (LlamaModel and its descendants in conversion/)."""
    llama3 = str(rope_parameters(d.config, d.where)["rope_type"]).lower() == "llama3"
    return (GgufPart("rope_freqs.weight", (d.head_dim // 2,)),) if llama3 else ()
