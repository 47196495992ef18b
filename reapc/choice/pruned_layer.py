"""Layers with only some of their experts, made of loaded whole ones: what a pruned checkpoint's layers would be, with
none on disk. The layer is transformers' own class of the pruned config, so whatever a family's router does with fewer
experts is done here too; its tensors are those of the whole layer, cut where they have an axis of experts."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reapc.errors import CannotBeDone
from reapc.prune.rewrite import with_counts
from reapc.prune.table import remapped
from reapc.stream.expert_store import KeptExperts
from reapc.stream.experts import find_experts
from reapc.stream.model import LoadedLayer, StreamedModel
from reapc.stream.skeleton import Skeleton


class PrunedLayers:
    """``count`` experts of every layer of ``model``. ``dissolve_groups``, ``values``: see ``prune``. A pruned layer is
    computed by ``model`` itself, and shares the weights and the store of the layer that it was made of."""

    def __init__(
        self,
        model: StreamedModel,
        count: int,
        dissolve_groups: bool = False,
        values: Mapping[int, NDArray[np.float64]] | None = None,
    ) -> None:
        view = copy(model.checkpoint)
        view.spec = model.spec.with_experts(count)
        view.config = with_counts(deepcopy(model.checkpoint.config), model.spec, count, False, dissolve_groups)
        self.model, self.count = model, count
        self._values = values or {}
        self._skeleton = Skeleton(view, model.dtype)
        self._layers: list[nn.Module] = list(self._skeleton.body.layers)

    def layer(self, whole: LoadedLayer, kept: list[int]) -> LoadedLayer:
        """The layer ``whole`` with only the experts ``kept``; CannotBeDone where the two classes do not correspond."""
        if whole.experts is None:
            return whole
        module, device = deepcopy(self._layers[whole.index]), self.model.device
        path, replaced = find_experts(module, self.count)
        store = KeptExperts(whole.experts.store, kept)
        experts = type(whole.experts)(replaced, self.count, store, whole.experts.scale)
        module.set_submodule(path, experts)
        tensors, chosen = whole.module.state_dict(), torch.tensor(kept, device=device)
        cut = {name: self._cut(name, tensors, empty, chosen) for name, empty in module.state_dict().items()}
        for name in cut.keys() & self._tables(whole.index, cut):
            table = remapped(cut[name].cpu().numpy(), kept, self._values[whole.index], name)
            cut[name] = torch.from_numpy(table).to(device)
        module.load_state_dict(cut, strict=True, assign=True)
        self._skeleton.real_buffers(module, device)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return LoadedLayer(whole.index, module, experts)

    def _cut(
        self, name: str, whole: Mapping[str, torch.Tensor], empty: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        tensor = whole.get(name)
        if tensor is not None and tensor.shape == empty.shape:
            return tensor
        axis = expert_axis(tensor, empty, self.model.spec.num_experts, self.count) if tensor is not None else None
        if tensor is None or axis is None:
            raise CannotBeDone(
                f"{self.model.checkpoint.folder}: {name} of the pruned layer is not one of the whole one"
            )
        return tensor.index_select(axis, chosen)

    def _tables(self, index: int, names: Mapping[str, torch.Tensor]) -> set[str]:
        """The tensors whose values are numbers of experts."""
        ends = {g.name.rpartition(".")[2] for g in self.model.spec.layers[index].kind.tensors if g.names_experts}
        return {name for name in names if name.rpartition(".")[2] in ends}


def expert_axis(whole: torch.Tensor, pruned: torch.Tensor, experts: int, count: int) -> int | None:
    """The axis on which the one has ``experts`` and the other ``count``, all others being equal; None where there is
    none."""
    if whole.dim() != pruned.dim():
        return None
    different = [i for i, (a, b) in enumerate(zip(whole.shape, pruned.shape, strict=True)) if a != b]
    fits = len(different) == 1 and (whole.shape[different[0]], pruned.shape[different[0]]) == (experts, count)
    return different[0] if fits else None
