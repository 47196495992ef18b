"""What a layer's router decides, with all experts and with fewer, on the same tokens: seen by running the block itself
and stopping where it hands over to its experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reapc.choice.pruned_layer import expert_axis
from reapc.errors import CannotBeDone
from reapc.stream.experts import ScaledInputExperts, StreamedExperts, routing_given
from reapc.stream.model import LoadedLayer

# Greatest share by which masked and pruned coefficients may differ (L2): rounding, and ties that fall the other way.
TOLERANCE = 1e-2


class _Handed(Exception):
    """Ends a block where its experts are called; carries what they are given."""

    def __init__(self, *given: torch.Tensor) -> None:
        self.given = given


class Block:
    """The module that calls the experts of a layer: its MoE block, or the layer itself (Gemma-4)."""

    def __init__(self, layer: LoadedLayer) -> None:
        assert layer.experts is not None
        self.experts: StreamedExperts = layer.experts
        path = next(name for name, child in layer.module.named_modules() if child is layer.experts)
        self.path = path.rpartition(".")[0]
        self.module: nn.Module = layer.module.get_submodule(self.path)

    def handed(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices, gate weights), both (tokens, top_k), that the router gives for the block's arguments."""

        def stop(_: nn.Module, args: Any, kwargs: Any) -> NoReturn:
            raise _Handed(*routing_given(*args[1:], **kwargs))

        hook = self.experts.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.inference_mode():
                self.module(*args, **kwargs)
        except _Handed as handed:
            index, weights = handed.given
            return index, weights.float() * self.experts.scale
        finally:
            hook.remove()
        raise CannotBeDone(f"{type(self.module).__name__} did not call its experts")


class Seen:
    """What a block was given and gave in one forward: ``args`` and ``kwargs`` of the block; ``inputs`` (tokens, in) and
    ``index``, ``weights`` (tokens, top_k) of the experts; ``total`` (tokens, in), the sum that they gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: torch.Tensor
    index: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    total: torch.Tensor


@contextmanager
def watched(block: Block) -> Iterator[Seen]:
    """Yields a ``Seen`` that every forward of the block fills anew. Where gate weights multiply the experts' inputs
    (Llama-4), ``index`` and ``weights`` stay None."""
    seen, experts = Seen(), block.experts
    scaled = isinstance(experts, ScaledInputExperts)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.args, seen.kwargs = args, kwargs

    def after(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        seen.total = output.reshape(-1, output.shape[-1]) * experts.scale
        if scaled:
            seen.total = output.reshape(experts.num_experts, -1, output.shape[-1]).sum(dim=0)
            return
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.inputs = hidden.reshape(-1, hidden.shape[-1])
        seen.index, weights = routing_given(*args[1:], **kwargs)
        seen.weights = weights.float() * experts.scale

    hooks = [
        block.module.register_forward_pre_hook(before, with_kwargs=True),
        experts.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def coefficients(index: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """(tokens, ``experts``): what each expert's output is multiplied with, 0 where it is not chosen."""
    dense = torch.zeros(len(index), experts, device=weights.device)
    return dense.scatter_add_(1, index.long(), weights)


class _MaskedLinear(TorchFunctionMode):
    """Gives what the linear with ``weight`` gave before, with -inf for the experts of ``mask``; or, while there is
    nothing yet, keeps what it gives."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.logits: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear or not self._is_router(args[1] if len(args) > 1 else kwargs["weight"]):
            return func(*args, **kwargs)
        self.calls += 1
        if self.logits is None:
            self.logits = func(*args, **kwargs)
            return self.logits
        assert self.rows is not None
        assert self.mask is not None
        return self.logits.reshape(-1, self.logits.shape[-1])[self.rows].masked_fill(self.mask, float("-inf"))

    def _is_router(self, weight: torch.Tensor) -> bool:
        if weight is self.weight:
            return True
        return weight.shape == self.weight.shape and torch.equal(weight.to(self.weight.dtype), self.weight)


class MaskedRouter:
    """The real router of a layer, asked again and again about the same tokens with ever fewer experts: the logits of
    those that are gone become -inf, and so do their correction biases. Nothing of a family's rule is written anew.

    ``whole``: the layer; ``pruned``: the same with fewer experts, which tells what has an axis of experts; ``hidden``
    (tokens, width): the block's input. CannotBeDone where the block takes more than that, or has no such router."""

    def __init__(self, whole: LoadedLayer, pruned: LoadedLayer, hidden: torch.Tensor) -> None:
        self._block, self._hidden = Block(whole), hidden
        other = Block(pruned).module.state_dict()
        experts, count = self._block.experts.num_experts, Block(pruned).experts.num_experts
        weights: list[torch.Tensor] = []
        self._biases: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        for name, tensor in self._block.module.state_dict().items():
            axis = expert_axis(tensor, other[name], experts, count)
            if axis is None:
                continue
            if tensor.dim() == 2 and axis == 0 and tensor.shape[1] > 1:
                weights.append(tensor)
                continue
            owner, _, key = name.rpartition(".")
            module: Any = self._block.module.get_submodule(owner)
            place = module._parameters if key in module._parameters else module._buffers
            self._biases.append((place, key, tensor, axis))
        if len(weights) != 1:
            raise CannotBeDone(f"its block has {len(weights)} matrices with a row for each expert, not one")
        self._linear = _MaskedLinear(weights[0])
        try:
            self._first = self._ask(hidden)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CannotBeDone(f"its block does not run on hidden states alone ({error})") from error
        if self._linear.calls != 1:
            raise CannotBeDone(f"its block computes router logits {self._linear.calls} times, not once")

    def _ask(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self._linear:
            return self._block.handed(hidden[None])

    def __call__(self, rows: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices, gate weights) of the tokens ``rows`` without the experts where ``gone`` (experts,) is True."""
        self._linear.rows, self._linear.mask = rows, gone
        try:
            for place, key, tensor, axis in self._biases:
                shape = [-1 if i == axis else 1 for i in range(tensor.dim())]
                place[key] = tensor.masked_fill(gone.reshape(shape), float("-inf"))
            return self._ask(self._hidden[rows])
        finally:
            for place, key, tensor, _ in self._biases:
                place[key] = tensor

    def check(self, pruned: LoadedLayer, kept: list[int]) -> None:
        """CannotBeDone unless the router without all but ``kept`` decides what that of the layer ``pruned`` does."""
        experts = self._block.experts.num_experts
        numbers = torch.tensor(kept, device=self._hidden.device)
        gone = torch.ones(experts, dtype=torch.bool, device=self._hidden.device)
        gone[numbers] = False
        index, weights = Block(pruned).handed(self._hidden[None])
        real = coefficients(numbers[index], weights, experts)
        everything = torch.arange(len(self._hidden), device=self._hidden.device)
        masked = coefficients(*self(everything, gone), experts)
        if not float((masked - real).norm()) <= TOLERANCE * float(real.norm()):
            raise CannotBeDone("masking experts in its router is not what pruning them does")
