"""One decoder layer at a time, driven by the transformers class itself, with weights mapped from the checkpoint.

The class's own ``forward`` runs for every layer and batch, with placeholders in its layers: so positions, masks,
scales and what else a family hands its layers are transformers' and not ours. The placeholder of the layer that is
computed puts the stored hidden states in, and its result ends the pass; the others let everything through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.stream.expert_store import ExpertStore
from reapc.stream.expert_weights import ExpertReader, expert_places
from reapc.stream.experts import LayerObserver, ScaledInputExperts, StreamedExperts, find_experts
from reapc.stream.families import FAMILIES, carried_width, streams
from reapc.stream.readahead import Readahead
from reapc.stream.skeleton import Skeleton

FLOAT_DTYPES = ("F32", "F16", "BF16")
INTEGER_DTYPES = ("I64", "I32")  # DeepSeek-V4's table of experts by token id


# What MLA's queries without their positions are called beside the linears of an attention: llama.cpp multiplies its k_b
# with them.
Q_NOPE = "q_nope"


class Forward(Protocol):
    def __call__(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        observer: LayerObserver | None,
        ids: torch.Tensor | None = None,
        carried: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states (batch, length, width) after the layer, of those before it; ``mask`` (batch, length), True where
        a token is real; ``ids`` likewise, for routers that look tokens up; ``carried``: see ``StreamedModel``."""


class _Reached(Exception):
    """Ends a pass; carries what was to be seen."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Slot(nn.Module):
    """Stands at a layer's place; whatever else is asked of it (its attention's type) the layer answers."""

    def __init__(self, layer: nn.Module, index: int, owner: StreamedModel) -> None:
        super().__init__()
        object.__setattr__(self, "_known", (layer, index, owner))  # no submodules: neither is this one's to load

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_known"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _, index, owner = self.__dict__["_known"]
        return owner._at(index, args, kwargs)


class _Given(nn.Module):
    """Stands at the embedding's place: gives what it was told to."""

    value: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """Asked for its device (Llama-4, MiMo-V2)."""
        return self.value

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.value


@dataclass(frozen=True)
class LoadedLayer:
    """One layer with its tensors, but for the experts, which come one at a time from the store of ``experts``."""

    index: int
    module: nn.Module
    experts: StreamedExperts | None

    def finish(self) -> None:
        """To be called when every batch was computed: refuses NaN in experts that no token was sent to."""
        if self.experts is not None:
            self.experts.store.check_rest(self.experts.num_experts)


class StreamedModel:
    """A checkpoint as a sequence of layers, computed on ``device`` in ``dtype`` (see devices.py).

    States between layers are (batch, length, ``width``). ``carried`` is what the last layer handed on beside them
    ((batch, length, ``carried_width``) indices; None where nothing is).
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.device = torch.device(device)
        self._skeleton = Skeleton(checkpoint, dtype)
        self._readahead = Readahead(checkpoint)
        self._check_dtypes()
        self._observer: LayerObserver | None = None
        self._valid: torch.Tensor | None = None
        self._particular = FAMILIES[self.spec.family]
        self._body: Any = self._skeleton.body
        self._text = self._skeleton.text
        self._streams = streams(self.spec, checkpoint.config)
        self.width = self.spec.hidden_size * self._streams
        self.carried: torch.Tensor | None = None
        self.carried_width = carried_width(self.spec, checkpoint.config)
        self._outer = {t.role: t.name for t in self.spec.outer_tensors if t.name.endswith("weight")}
        self._embedding = deepcopy(self._body.get_input_embeddings())
        self._skeleton.real_buffers(self._embedding, self.device)
        self._layers: list[nn.Module] = list(self._body.layers)
        if len(self._layers) != self.spec.num_layers:
            raise CannotBeDone(
                f"{checkpoint.folder}: transformers makes {len(self._layers)} layers of this config, not "
                f"{self.spec.num_layers}"
            )
        self._paths = [self._skeleton.path(layer) for layer in self._layers]
        self._load_outer()
        for index, layer in enumerate(self._layers):
            self._body.layers[index] = _Slot(layer, index, self)
        self._given = _Given()
        place = next(n for n, child in self._body.named_modules() if child is self._body.get_input_embeddings())
        self._body.set_submodule(place, self._given)
        self._skeleton.real_buffers(self._body, self.device)
        self._states: torch.Tensor | None = None
        self._target = -1
        self._module: nn.Module | None = None

    def _check_dtypes(self) -> None:
        for tensor in self.spec.tensors():
            found = self.checkpoint.dtype_of(tensor.name)
            if found not in FLOAT_DTYPES and not (tensor.role == "router" and found in INTEGER_DTYPES):
                raise CannotBeDone(
                    f"{self.checkpoint.where(tensor.name)}: tensor {tensor.name!r} is stored as {found}",
                    hint=f"this version observes checkpoints in {', '.join(FLOAT_DTYPES)}",
                )

    def _load_outer(self) -> None:
        """The final norm, and what else stands between the last layer and the head."""
        body, path = self._body, self._skeleton.path(self._body)
        names = [tensor.name for tensor in self.spec.outer_tensors if tensor.role not in ("embedding", "lm_head")]
        rest = nn.ModuleDict(
            {
                name: deepcopy(child)
                for name, child in body.named_children()
                if child is not body.layers and child is not body.get_input_embeddings() and child.state_dict()
            }
        )
        self._skeleton.load(rest, path, names, self._read, self.device)
        for name, child in rest.items():
            body.set_submodule(name, child)
        self._final = [rest[name] for name in ("hc_head", "norm", "norm_f") if name in rest]
        if not self._final or len(self._final) != len(rest):
            raise CannotBeDone(f"{self.checkpoint.folder}: {type(body).__name__} has parts that are not understood")

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.checked_tensor(name)

    def _read_expert(self, name: str, expert: int) -> torch.Tensor:
        return self.checkpoint.read_expert(name, expert, self.device)

    def _pass(self, ids: torch.Tensor, given: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """Runs the class's forward until a slot has what is wanted."""
        self._given.value = given
        real = None if mask is None else mask.to(self.device).long()
        try:
            with torch.inference_mode():
                self._body(input_ids=ids.to(self.device), attention_mask=real, use_cache=False)
        except _Reached as reached:
            return reached.value
        raise CannotBeDone(f"{type(self._body).__name__} did not come to layer {self._target}")

    def _at(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a slot answers."""
        if self._states is None:  # only the input of the first layer is wanted
            raise _Reached(args[0] if args else kwargs["hidden_states"])
        if index < self._target:
            return (self._states, self.carried) if self._particular.carries else self._states
        assert self._module is not None
        kwargs.pop("hidden_states", None)
        if self._particular.carries:
            kwargs["prev_topk_indices"] = self.carried
        raise _Reached(self._module(self._states, *args[1:], **kwargs))

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) ids to the states before the first layer, (batch, length, width)."""
        table = self.checkpoint.tensor(self._outer["embedding"])
        used, places = torch.unique(input_ids, return_inverse=True)
        self._embedding.weight = nn.Parameter(table[used].to(self.device, self.dtype), requires_grad=False)
        self._embedding.padding_idx = None
        with torch.inference_mode():
            given = self._embedding(places.to(self.device))
        self._states = None
        states: torch.Tensor = self._pass(input_ids, given, None)
        return states.reshape(*input_ids.shape, self.width)

    def head(self, hidden: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Log-probabilities (tokens, vocabulary) in fp32 of final states (tokens, width). ``rows``: so many of the
        vocabulary at a time, where the whole matrix in ``dtype`` is too much."""
        for module in self._final:
            split = self._streams > 1 and hidden.shape[-1] == self.width
            hidden = module(hidden.reshape(1, -1, self._streams, self.spec.hidden_size) if split else hidden)
        hidden = hidden.reshape(-1, self.spec.hidden_size)
        weight, bias = self.checkpoint.tensor(self.head_name), self._head_bias()
        if rows is None:
            logits = F.linear(hidden, weight.to(self.device, self.dtype), bias)
        else:
            logits = hidden.new_empty(len(hidden), len(weight))
            for start in range(0, len(weight), rows):
                part = slice(start, start + rows)
                some = None if bias is None else bias[part]
                logits[:, part] = F.linear(hidden, weight[part].to(self.device, self.dtype), some)
        if scaling := getattr(self._text, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(self._text, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return torch.log_softmax(logits.float(), dim=-1)

    @property
    def head_name(self) -> str:
        """The head's tensor on disk."""
        return self._outer["embedding" if self.spec.tied_embeddings else "lm_head"]

    def _head_bias(self) -> torch.Tensor | None:
        name = self._outer.get("lm_head", "").removesuffix("weight") + "bias"
        names = {tensor.name for tensor in self.spec.outer_tensors}
        return self.checkpoint.tensor(name).to(self.device, self.dtype) if name in names else None

    def check_outer(self) -> None:
        """Refuses NaN or infinity in embeddings, final norm and head."""
        for tensor in self.spec.outer_tensors:
            self.checkpoint.checked_tensor(tensor.name)

    def load(self, index: int) -> LoadedLayer:
        """The layer, ready to be computed. May be called while another thread computes an earlier one."""
        spec = self.spec.layers[index]
        module = deepcopy(self._layers[index])
        experts = self._make_experts(index, module) if spec.is_moe else None
        disk = [tensor.name for tensor in self.spec.layer_tensors(index) if tensor.role != "expert"]
        self._readahead.ask((name, None) for name in disk)
        names = self._skeleton.load(module, self._paths[index], disk, self._read, self.device)
        self._hook_linears(module, names, spec.prefix)
        return LoadedLayer(index, module, experts)

    def stored_bytes(self, index: int) -> int:
        """What the layer's tensors take on disk."""
        return self._readahead.bytes_of((tensor.name, None) for tensor in self.spec.layer_tensors(index))

    @contextmanager
    def layer(self, index: int) -> Iterator[Forward]:
        """Yields the layer's ``Forward``; the layer is dropped afterwards."""
        loaded = self.load(index)
        with self.computing(loaded) as forward:
            yield forward
        loaded.finish()

    @contextmanager
    def computing(self, layer: LoadedLayer) -> Iterator[Forward]:
        """Yields the ``Forward`` of a layer that was loaded."""
        self._module = layer.module
        try:
            yield partial(self._forward, layer)
        finally:
            self._module = self._states = self.carried = self._observer = self._valid = None

    def _forward(
        self,
        layer: LoadedLayer,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        observer: LayerObserver | None,
        ids: torch.Tensor | None = None,
        carried: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._observer = observer
        self._valid = None if mask is None else mask.reshape(-1)
        if layer.experts is not None:
            layer.experts.observer, layer.experts.valid = observer, self._valid
        shape = hidden.shape
        inner = hidden.reshape(*shape[:2], self._streams, -1) if self._streams > 1 else hidden
        self._states, self._target, self.carried = inner, layer.index, carried
        if ids is None:
            ids = torch.zeros(shape[:2], dtype=torch.long)
        given = torch.zeros(1, dtype=self.dtype, device=self.device).expand(*shape[:2], self.spec.hidden_size)
        result: Any = self._pass(ids, given, mask)
        if isinstance(result, tuple):
            result, *others = result
            self.carried = others[0] if self._particular.carries else None
        after: torch.Tensor = result.reshape(shape)
        return after

    def _make_experts(self, index: int, module: nn.Module) -> StreamedExperts:
        """Puts the streamed experts in the place of the layer's own."""
        spec, particular = self.spec.layers[index], self._particular
        places = expert_places(spec.kind, particular.transposed)
        one = self._read_expert if self.checkpoint.decodes else None
        reader = ExpertReader(places, spec.prefix, self._read, one)
        store = ExpertStore(reader, self._readahead, self.device, self.dtype)
        path, replaced = find_experts(module, self.spec.num_experts)
        scale = 1.0
        if particular.scaled_after:
            block: Any = module.get_submodule(path.rpartition(".")[0])
            scale = float(block.routed_scaling_factor)
        kind = ScaledInputExperts if particular.scaled_inputs else StreamedExperts
        experts = kind(replaced, self.spec.num_experts, store, scale)
        module.set_submodule(path, experts)
        return experts

    def _hook_linears(self, module: nn.Module, names: dict[str, str], prefix: str) -> None:
        """Shows the current observer the inputs of every linear outside the experts, under its name on disk; padding is
        left out."""

        def hook(name: str) -> Any:
            def show(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if self._observer is not None:
                    inputs = args[0].reshape(-1, args[0].shape[-1])
                    usable = self._valid is not None and len(inputs) == len(self._valid)
                    self._observer.linear(name, inputs[self._valid] if usable else inputs)

            return show

        self._hook_queries(module, prefix, hook)
        for name, child in module.named_modules():
            if isinstance(child, nn.Linear):
                child.register_forward_pre_hook(hook(names.get(name, f"{prefix}.{name}")))

    def _hook_queries(self, module: nn.Module, prefix: str, hook: Callable[[str], Any]) -> None:
        """Shows the observer the queries of latent attention, (tokens, heads x qk_nope_head_dim)."""
        for name, child in module.named_modules():
            if not hasattr(child, "kv_b_proj") or not hasattr(child, "qk_nope_head_dim"):
                continue
            attention: Any = child
            last = attention.q_b_proj if getattr(attention, "q_lora_rank", None) else attention.q_proj
            nope, whole = attention.qk_nope_head_dim, attention.qk_nope_head_dim + attention.qk_rope_head_dim
            show = hook(f"{prefix}.{name}.{Q_NOPE}")

            def keep(
                _: nn.Module, __: Any, output: torch.Tensor, show: Any = show, nope: int = nope, whole: int = whole
            ) -> None:
                queries = output.reshape(*output.shape[:-1], -1, whole)[..., :nope]
                show(_, (queries.flatten(-2),))

            last.register_forward_hook(keep)
