"""Builds one decoder layer at a time from the transformers class, with weights mapped from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.stream.experts import ExpertWeights, LayerObserver, StreamedExperts
from reapc.stream.families import ExpertNames, check_family, expert_names

FLOAT_DTYPES = ("F32", "F16", "BF16")
Forward = Callable[[torch.Tensor, torch.Tensor | None, LayerObserver | None], torch.Tensor]


def compute_settings(device: str = "auto", dtype: str = "auto", stored: str = "bfloat16") -> tuple[str, torch.dtype]:
    """Device and dtype of a pass: fp32 on a CPU, on a GPU the dtype that the model is ``stored`` in."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CannotBeDone(f"device {device!r}: torch sees no GPU here", hint="--device cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else stored
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ReapcError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    return device, found


class StreamedModel:
    """A checkpoint as a sequence of layers, computed on ``device`` in ``dtype`` (see ``compute_settings``)."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        check_family(checkpoint.spec, str(checkpoint.folder))
        from transformers import AutoConfig, AutoModelForCausalLM

        self._observer: LayerObserver | None = None
        self._valid: torch.Tensor | None = None
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.device = torch.device(device)
        for tensor in self.spec.tensors():
            found = checkpoint.dtype_of(tensor.name)
            if found not in FLOAT_DTYPES:
                raise CannotBeDone(
                    f"{checkpoint.where(tensor.name)}: tensor {tensor.name!r} is stored as {found}",
                    hint=f"this version observes checkpoints in {', '.join(FLOAT_DTYPES)}",
                )
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config._attn_implementation = "sdpa"
        self.config = config
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._body = skeleton.get_decoder()
        self._rotary = type(self._body.rotary_emb)(config).to(self.device)
        # Names on disk by role; the final norm's is a module's.
        self._outer = {tensor.role: tensor.name for tensor in self.spec.outer_tensors}
        self._norm = self._load(self._body.norm, self._outer["norm"].rsplit(".", 1)[0]).requires_grad_(False)

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        """``module`` with its weights from ``prefix``; any missing or unexpected key is an error of ours.

        Each takes the dtype that the class gave it: a router's correction bias stays fp32 in a 16-bit model."""
        state = {}
        for name, empty in module.state_dict().items():
            state[name] = self.checkpoint.checked_tensor(f"{prefix}.{name}").to(self.device, empty.dtype)
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) ids to (batch, length, hidden)."""
        table = self.checkpoint.tensor(self._outer["embedding"])
        return F.embedding(input_ids, table).to(self.device, self.dtype)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (tokens, vocabulary) in fp32 of final hidden states (tokens, hidden)."""
        name = self._outer["embedding" if self.spec.tied_embeddings else "lm_head"]
        logits = F.linear(self._norm(hidden), self.checkpoint.tensor(name).to(self.device, self.dtype))
        return torch.log_softmax(logits.float(), dim=-1)

    def check_outer(self) -> None:
        """Refuses NaN or infinity in embeddings, final norm and head."""
        for tensor in self.spec.outer_tensors:
            self.checkpoint.checked_tensor(tensor.name)

    def _experts_of(self, prefix: str, names: ExpertNames) -> Callable[[int], ExpertWeights]:
        """An expert's weights by its number: mapped from the file, or, where they are quantized, decoded whenever they
        are needed, so that a layer costs no memory beyond one expert either way."""

        def load(expert: int) -> ExpertWeights:
            gate, up, down = (f"{prefix}.{part.replace('{e}', str(expert))}" for part in names.parts)
            checked = self.checkpoint.checked_tensor
            return checked(gate), checked(up), checked(down)

        if self.checkpoint.quantization is not None:
            return load
        return [load(expert) for expert in range(self.spec.num_experts)].__getitem__

    @contextmanager
    def layer(self, index: int) -> Iterator[Forward]:
        """Yields ``forward(hidden (b, n, h), mask (b, n) or None, observer or None) -> hidden``; the layer is
        dropped afterwards."""
        module = self._body.layers[index]
        layer = self.spec.layers[index]
        prefix = layer.prefix
        experts: StreamedExperts | None = None
        if layer.is_moe:
            names = expert_names(layer.kind)
            weights = self._experts_of(prefix, names)
            activation = module.get_submodule(names.module).act_fn
            experts = StreamedExperts(self.spec.num_experts, weights, activation, self.dtype, self.device)
            module.set_submodule(names.module, experts)
        self._load(module, prefix)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self._hook_linears(module, prefix)

        def forward(hidden: torch.Tensor, mask: torch.Tensor | None, observer: LayerObserver | None) -> torch.Tensor:
            self._observer = observer
            self._valid = None if mask is None else mask.reshape(-1)
            if experts is not None:
                experts.observer, experts.valid = observer, self._valid
            return self._forward(module, hidden, mask)

        yield forward
        self._body.layers[index] = nn.Identity()

    def _forward(self, module: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        from transformers.masking_utils import create_causal_mask

        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        causal = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
        )
        with torch.inference_mode():
            result = module(
                hidden,
                attention_mask=causal,
                position_ids=positions,
                position_embeddings=self._rotary(hidden, position_ids=positions),
            )
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _hook_linears(self, module: nn.Module, prefix: str) -> None:
        """Shows the current observer the inputs of every linear outside the experts; padding is left out."""

        def hook(name: str) -> Any:
            def show(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if self._observer is not None:
                    inputs = args[0].reshape(-1, args[0].shape[-1])
                    self._observer.linear(name, inputs if self._valid is None else inputs[self._valid])

            return show

        for name, child in module.named_modules():
            if isinstance(child, nn.Linear):
                child.register_forward_pre_hook(hook(f"{prefix}.{name}"))
