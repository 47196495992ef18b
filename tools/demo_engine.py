"""What makes a small Mixture-of-Experts model train fast on few CPU threads: an expert routine and Muon."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_NAME = "demo_sorted"
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory, so that activations do not fault in fresh pages at every step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class _SortedExperts(torch.autograd.Function):
    """The experts' MLPs over tokens sorted by expert, with gathers (no scatter) in both directions."""

    @staticmethod
    def forward(ctx, hidden, weights, gate_up, down, order, inverse, bounds):
        tokens, top_k = weights.shape
        sorted_hidden = hidden[order // top_k]
        projected = hidden.new_empty(len(order), gate_up.shape[1])
        for expert, (start, stop) in enumerate(bounds):
            torch.mm(sorted_hidden[start:stop], gate_up[expert].t(), out=projected[start:stop])
        gate, up = projected.chunk(2, dim=-1)
        inner = F.silu(gate).mul_(up)
        result = torch.empty_like(sorted_hidden)
        for expert, (start, stop) in enumerate(bounds):
            torch.mm(inner[start:stop], down[expert].t(), out=result[start:stop])
        per_token = result[inverse].view(tokens, top_k, -1)
        ctx.save_for_backward(sorted_hidden, weights, gate_up, down, order, inverse, projected, inner, per_token)
        ctx.bounds = bounds
        return torch.bmm(weights.unsqueeze(1), per_token).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        sorted_hidden, weights, gate_up, down, order, inverse, projected, inner, per_token = ctx.saved_tensors
        tokens, top_k = weights.shape
        grad_weights = torch.bmm(per_token, grad.unsqueeze(2)).squeeze(2)
        grad_result = grad[order // top_k].mul_(weights.reshape(-1)[order].unsqueeze(1))
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_inner, grad_sorted = torch.empty_like(inner), torch.empty_like(sorted_hidden)
        for expert, (start, stop) in enumerate(ctx.bounds):
            part = grad_result[start:stop]
            torch.mm(part, down[expert], out=grad_inner[start:stop])
            torch.mm(part.t(), inner[start:stop], out=grad_down[expert])
        gate, up = projected.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad_inner * up, gate)
        grad_projected = torch.cat([grad_gate, grad_inner.mul_(F.silu(gate))], dim=-1)
        for expert, (start, stop) in enumerate(ctx.bounds):
            part = grad_projected[start:stop]
            torch.mm(part, gate_up[expert], out=grad_sorted[start:stop])
            torch.mm(part.t(), sorted_hidden[start:stop], out=grad_gate_up[expert])
        grad_hidden = grad_sorted[inverse].view(tokens, top_k, -1).sum(dim=1)
        return grad_hidden, grad_weights, grad_gate_up, grad_down, None, None, None


def sorted_experts(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Drop-in experts implementation for transformers: one matrix product per expert and projection."""
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    stops = torch.bincount(flat, minlength=self.num_experts).cumsum(0).tolist()
    bounds = list(zip([0, *stops[:-1]], stops, strict=True))
    return _SortedExperts.apply(hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, order, inverse, bounds)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, sorted_experts)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    current = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = current @ current.t()
        current = torch.addmm(current, torch.addmm(gram, gram, gram, beta=b, alpha=c), current, beta=a)
    return current if wide is matrix else current.t()


class Muon(torch.optim.Optimizer):
    """Muon for matrices and for stacks of matrices (experts); ``torch.optim.Muon`` takes no stacks."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix along its orthogonalised, Nesterov-averaged gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(average, group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                for part, towards in zip(_matrices(parameter), _matrices(direction), strict=True):
                    scale = max(1.0, part.shape[0] / part.shape[1]) ** 0.5
                    part.add_(orthogonalise(towards), alpha=-group["lr"] * scale)


def _matrices(tensor: Tensor) -> list[Tensor]:
    """The 2-D views of a matrix, or of a stack whose matrices may hold gate and up above each other."""
    if tensor.dim() == 2:
        return [tensor]
    halves = 2 if tensor.shape[1] == 2 * tensor.shape[2] else 1
    return [half for matrix in tensor for half in matrix.chunk(halves)]
