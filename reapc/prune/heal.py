"""Healing: the surviving experts' down projections refitted in closed form, so that each layer's output comes back to
the original's. Two streams run side by side, a layer at a time: the original model, and the pruned one with every layer
before already healed, its weights rounded as they are stored. No gradients, no new tensors.

What a layer lacks at a token, R = original output - pruned output, is to be met by sum over chosen experts of
gate weight x (change of its down projection) x activation. The experts take turns (block coordinate descent), each by
ridge least squares over the tokens routed to it (refit.py). Another set of sequences chooses the strength of each, and
whether the layer keeps its refit at all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from reapc.checkpoint.atomic import atomic_path, claim_folder, remove, require_room
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, read_header, write_copied
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import Slot, write_index, write_streamed
from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Progress
from reapc.prune.refit import Normal, solve
from reapc.stream.expert_weights import Expert, Stored, expert_places
from reapc.stream.experts import StreamedExperts
from reapc.stream.families import FAMILIES
from reapc.stream.model import Forward, StreamedModel
from reapc.stream.run import TOKENS_PER_BATCH, HiddenStates, states_of
from reapc.stream.tokens import Batch, Tokens

SWEEPS = 2
_CHUNK_PAIRS = 8192
_OWN_FILE = re.compile(r"^(identity|layer-\d+\.(json|safetensors))(\.partial)?$|^[a-z-]+(-[01])?\.bin$")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class HealedLayer:
    """Mean square over tokens and channels of what the layer lacks: ``fit`` on the tokens fitted, ``choice`` on the
    others, (before, after). ``kept``: whether the refit stays; ``changed``: how many of the experts it changes."""

    layer: int
    fit: tuple[float, float]
    choice: tuple[float, float]
    kept: bool
    changed: int


class _Pairs:
    """What the pruned layer's experts are given of one token set: an observer of its forward."""

    def __init__(self, tokens: Tokens, inputs: np.ndarray) -> None:
        self._tokens = tokens
        self._inputs = inputs
        self._places = np.zeros(0, np.int64)
        self._found: dict[int, list[tuple[np.ndarray, torch.Tensor]]] = {}

    def batch(self, rows: slice, length: int, mask: torch.Tensor | None) -> None:
        numbers = np.arange(rows.start, rows.stop)[:, None] * self._tokens.length + np.arange(length)
        self._places = numbers.reshape(-1)

    def routed(
        self,
        expert: int,
        inputs: torch.Tensor,
        activated: torch.Tensor,
        outputs: torch.Tensor,
        gate: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        places = self._places[tokens.cpu().numpy()]
        self._inputs[places] = inputs.float().cpu().numpy()
        self._found.setdefault(expert, []).append((places, gate.float().cpu()))

    def linear(self, module: str, inputs: torch.Tensor) -> None: ...

    def of(self, expert: int) -> tuple[np.ndarray, torch.Tensor]:
        """Token places and gate weights, (pairs,) each."""
        found = self._found.get(expert)
        if not found:
            return np.zeros(0, np.int64), torch.zeros(0)
        return np.concatenate([places for places, _ in found]), torch.cat([gates for _, gates in found])


class _Routed:
    """Sums gate weight x output of every token of one batch: what the experts add."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total

    def batch(self, rows: slice, length: int, mask: torch.Tensor | None) -> None: ...

    def routed(
        self,
        expert: int,
        inputs: torch.Tensor,
        activated: torch.Tensor,
        outputs: torch.Tensor,
        gate: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        self.total.index_add_(0, tokens, outputs * gate[:, None])

    def linear(self, module: str, inputs: torch.Tensor) -> None: ...


class _Side:
    """One token set in both models."""

    def __init__(self, name: str, tokens: Tokens, original: StreamedModel, pruned: StreamedModel, work: Path) -> None:
        self.tokens = tokens
        self.original = states_of(original, tokens, work, f"{name}-original")
        self.pruned = states_of(pruned, tokens, work, f"{name}-pruned")
        self._work, self._name = work, name
        count = tokens.sequences * tokens.length
        self.lacking = np.memmap(
            work / f"{name}-lacking.bin", np.float32, "w+", shape=(count, original.spec.hidden_size)
        )
        self.pairs: _Pairs | None = None

    def watch(self, inputs: int) -> _Pairs:
        """An observer for the next layer, whose experts take ``inputs`` channels."""
        count = self.tokens.sequences * self.tokens.length
        place = self._work / f"{self._name}-inputs.bin"
        self.pairs = _Pairs(self.tokens, np.memmap(place, np.float32, "w+", shape=(count, inputs)))
        self._inputs = self.pairs._inputs
        return self.pairs

    def place(self, batch: Batch) -> np.ndarray:
        """Where the batch's tokens lie in ``lacking``, (rows, length)."""
        rows = np.arange(batch.rows.start, batch.rows.stop)
        places: np.ndarray = rows[:, None] * self.tokens.length + np.arange(batch.length)
        return places

    def inputs(self, places: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._inputs[places])

    def error(self) -> float:
        """Mean square of what is lacking, over real tokens."""
        total = 0.0
        for batch in self.tokens.batches(TOKENS_PER_BATCH):
            total += float(np.square(self.lacking[self.place(batch)].astype(np.float64)).sum())
        return total / (self.tokens.count * int(self.lacking.shape[1]))

    def batches(self) -> Iterator[Batch]:
        return self.tokens.batches(TOKENS_PER_BATCH)


def disk_bytes(original: Checkpoint, fit: Tokens, choice: Tokens) -> int:
    """Bytes that healing takes on disk beside the result: states of both models, what is lacking, experts' inputs."""
    width = original.spec.hidden_size
    return sum(2 * HiddenStates.disk_bytes(t, width) + 2 * 4 * t.sequences * t.length * width for t in (fit, choice))


def heal(
    original: Checkpoint,
    pruned: Checkpoint,
    fit: Tokens,
    choice: Tokens,
    work: Path,
    out: Path,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[HealedLayer]:
    """Writes ``pruned`` with its experts' down projections refitted to ``original`` to the folder ``out``, atomically.

    ``fit``: tokens that are fitted; ``choice``: others, which choose. ``work`` holds what is resumed from, and is
    removed at the end. CannotBeDone for a quantized pruned checkpoint, a family whose layers do not simply add what
    their experts give, and where the room lacks."""
    pruned.refuse_quantized("healing")
    if pruned.spec.hidden_size != original.spec.hidden_size or pruned.spec.num_layers != original.spec.num_layers:
        raise ReapcError(
            f"{pruned.folder}: {pruned.spec.num_layers} layers of {pruned.spec.hidden_size} channels, the original in "
            f"{original.folder} has {original.spec.num_layers} of {original.spec.hidden_size}",
            hint="heal a pruned checkpoint with the model that it was pruned from",
        )
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another folder")
    claim_folder(work, json.dumps([original.digest, pruned.digest, fit.digest, choice.digest, str(dtype)]), _OWN_FILE)
    require_room(work, disk_bytes(original, fit, choice), "the hidden states of healing")
    require_room(out.parent, pruned.bytes, "the healed checkpoint")
    models = StreamedModel(original, dtype, device), StreamedModel(pruned, dtype, device)
    reports = Healing(*models, fit, choice, work, progress).run()
    write_healed(pruned, work, out)
    remove(work)
    return reports


def write_healed(pruned: Checkpoint, work: Path, out: Path) -> None:
    """Writes the folder ``out``: ``pruned`` with the tensors that ``work`` holds in the place of its own."""
    healed: dict[str, tuple[Path, list[tuple[int, int]]]] = {}
    for path in sorted(work.glob("layer-*.safetensors")):
        for entry in sorted(read_header(path)[0].values(), key=lambda e: e.start):
            healed.setdefault(entry.name.split("#")[0], (path, []))[1].append((entry.start, entry.end))
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        copy_side_files(pruned, partial, lambda _: None)
        shutil.copyfile(pruned.folder / "config.json", partial / "config.json")
        shards: dict[str, list[OutTensor]] = {shard.name: [] for shard in pruned.shards}
        for entry in sorted(pruned.entries.values(), key=lambda e: e.start):
            source, ranges = healed.get(entry.name, (pruned.shard_of[entry.name], [(entry.start, entry.end)]))
            tensor = OutTensor(entry.name, entry.dtype, entry.shape, source, tuple(ranges))
            shards[pruned.shard_of[entry.name].name].append(tensor)
        for name, tensors in shards.items():
            write_copied(partial / name, tensors, pruned.metadata[name])
        if (pruned.folder / INDEX).is_file():
            write_index(partial, shards)


class Healing:
    """One run over all layers; ``run`` leaves each layer's healed projections in ``work``."""

    def __init__(
        self,
        original: StreamedModel,
        pruned: StreamedModel,
        fit: Tokens,
        choice: Tokens,
        work: Path,
        progress: Progress,
    ) -> None:
        self.original, self.pruned = original, pruned
        self.work, self.progress = work, progress
        self.fit = _Side("fit", fit, original, pruned, work)
        self.choice = _Side("choice", choice, original, pruned, work)

    @property
    def sides(self) -> tuple[_Side, _Side]:
        return self.fit, self.choice

    def run(self) -> list[HealedLayer]:
        """Heals the layers that are not done yet; the reports of all that have experts."""
        spec = self.pruned.spec
        tokens = sum(batch.tokens for side in self.sides for batch in side.batches())
        reports = []
        for index in range(spec.num_layers):
            report = self.work / f"layer-{index}.json"
            if not report.is_file():
                break
            reports.append(json.loads(report.read_text()))
        start = len(reports)
        if start:
            self.progress.log(f"heal: {start} of {spec.num_layers} layers were done before; going on")
        with self.progress.task("heal", tokens * (spec.num_layers - start), "tokens x layers") as advance:
            if not start:
                self._embed()
            for index in range(start, spec.num_layers):
                done = self._layer(index)
                for side in self.sides:
                    side.original.flush()
                    side.pruned.flush()
                with atomic_path(self.work / f"layer-{index}.json") as partial:
                    partial.write_text(json.dumps(asdict(done) if done else None))
                reports.append(asdict(done) if done else None)
                advance(tokens)
        return [HealedLayer(**{**r, "fit": tuple(r["fit"]), "choice": tuple(r["choice"])}) for r in reports if r]

    def _embed(self) -> None:
        for side in self.sides:
            for batch in side.batches():
                states = self.original.embed(_ids(side.tokens, batch))
                side.original.write(0, batch, states)
                side.pruned.write(0, batch, states)

    def _layer(self, index: int) -> HealedLayer | None:
        """Both models' layer ``index``; healed where it has experts."""
        with self.original.layer(index) as forward:
            for side in self.sides:
                for batch in side.batches():
                    _compute(self.original, forward, side.original, index, batch, None)
        is_moe = self.pruned.spec.layers[index].is_moe
        layer = self.pruned.load(index)
        with self.pruned.computing(layer) as forward:
            if is_moe:
                assert layer.experts is not None
                self._check_adds(index, forward, layer.experts)
            for side in self.sides:
                watcher = side.watch(self._places(index).inputs) if is_moe else None
                for batch in side.batches():
                    result = _compute(self.pruned, forward, side.pruned, index, batch, watcher)
                    if is_moe:
                        target = side.original.read(index + 1, batch.rows, batch.length)
                        lacking = (target - result.float().cpu()).numpy()
                        lacking[~side.tokens.mask[batch.rows, : batch.length]] = 0
                        side.lacking[side.place(batch)] = lacking
            if not is_moe:
                return None
            assert layer.experts is not None
            return self._heal(index, layer.experts)

    def _places(self, index: int) -> Any:
        return expert_places(self.pruned.spec.layers[index].kind, FAMILIES[self.pruned.spec.family].transposed)

    def _check_adds(self, index: int, forward: Forward, experts: StreamedExperts) -> None:
        """CannotBeDone unless the layer's output is what it is without the experts, plus the sum that is recorded."""
        side = self.fit
        batch = Batch(slice(0, 1), int(side.tokens.lengths[0]))
        routed = _Routed(torch.zeros(batch.length, self.original.spec.hidden_size, device=self.pruned.device))
        whole = _compute(self.pruned, forward, side.pruned, index, batch, routed, store=False)
        muted = experts.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        try:
            rest = _compute(self.pruned, forward, side.pruned, index, batch, None, store=False)
        finally:
            muted.remove()
        if whole.shape[-1] == routed.total.shape[-1]:
            wrong = (whole - rest).reshape(routed.total.shape).float() - routed.total
            if float(wrong.norm()) <= 1e-2 * float(routed.total.norm()) + 1e-6:
                return
        raise CannotBeDone(
            f"{self.pruned.checkpoint.folder}: layer {index} of {self.pruned.spec.family} does not simply add what its "
            "experts give (a norm, a projection or several residual streams stand between)",
            hint="healing is not known for this family in this version; prune without",
        )

    def _heal(self, index: int, experts: StreamedExperts) -> HealedLayer:
        """Refits the experts of the layer, and stores what it gives then for the next one."""
        spec = self.pruned.spec
        places = self._places(index)
        down = _Down(self.pruned.checkpoint, f"{spec.layers[index].prefix}.", places.parts["down"])
        shape = (spec.num_experts, spec.hidden_size, places.width)
        changes = np.memmap(self.work / "changes.bin", np.float32, "w+", shape=shape)
        before = [side.error() for side in self.sides]
        changed: set[int] = set()
        for _ in range(SWEEPS):
            for expert in range(spec.num_experts):
                part = experts.store.get(expert)
                if self._visit(expert, part, experts, changes[expert], down):
                    changed.add(expert)
                else:
                    changed.discard(expert)
        after = [side.error() for side in self.sides]
        kept = bool(changed) and after[1] < before[1]
        if kept:
            for side in self.sides:
                for batch in side.batches():
                    target = side.original.read(index + 1, batch.rows, batch.length)
                    real = torch.from_numpy(side.tokens.mask[batch.rows, : batch.length])[..., None]
                    was = side.pruned.read(index + 1, batch.rows, batch.length)
                    lacking = torch.from_numpy(side.lacking[side.place(batch)])
                    side.pruned.write(index + 1, batch, torch.where(real, target - lacking, was))
            with atomic_path(self.work / f"layer-{index}.safetensors") as partial:
                down.write(partial, spec.num_experts, changes)
        return HealedLayer(index, (before[0], after[0]), (before[1], after[1]), kept, len(changed))

    def _visit(self, expert: int, part: Expert, experts: StreamedExperts, change: np.ndarray, down: _Down) -> bool:
        """One expert's turn: ``change`` (hidden, width) becomes what is best given all others, rounded as it is stored;
        whether there is any."""
        old = torch.from_numpy(np.array(change))
        fit = self._normal(self.fit, expert, part, experts)
        if fit is None:
            return False
        choice = self._normal(self.choice, expert, part, experts)
        few = self._gated(self.fit, expert, part, experts)
        pairs = next(few)[1].double() if fit.pairs < len(fit.normal.gram) else None
        if choice is None:
            return bool(old.any())
        found = solve(fit.normal.plus(old.double()), choice.normal.plus(old.double()), pairs)
        stored = down.weight(expert)
        new = down.rounded(stored + found.change.float()) - stored
        change[:] = new.numpy()
        step = (new - old).T
        if step.any():
            for side in self.sides:
                for places, gated in self._gated(side, expert, part, experts):
                    side.lacking[places] -= (gated @ step).numpy()
        return bool(new.any())

    def _gated(
        self, side: _Side, expert: int, part: Expert, experts: StreamedExperts
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Token places and gate weight x activation (pairs, width) of one expert, in chunks."""
        assert side.pairs is not None
        places, gates = side.pairs.of(expert)
        for start in range(0, len(places), _CHUNK_PAIRS):
            chunk = slice(start, start + _CHUNK_PAIRS)
            inputs = side.inputs(places[chunk]).to(self.pruned.device, self.pruned.dtype)
            with torch.inference_mode():
                activated = experts._activated(inputs, part).float().cpu()
            yield places[chunk], activated * gates[chunk, None]

    def _normal(self, side: _Side, expert: int, part: Expert, experts: StreamedExperts) -> _Counted | None:
        """The normal equations of one expert; None where no token was sent to it."""
        gram = right = None
        count = 0
        for places, gated in self._gated(side, expert, part, experts):
            count += len(places)
            lacking = torch.from_numpy(side.lacking[places])
            own, other = (gated.T @ gated).double(), (gated.T @ lacking).double()
            gram, right = (own, other) if gram is None or right is None else (gram + own, right + other)
        return None if gram is None or right is None else _Counted(Normal(gram, right), count)


class _Counted(NamedTuple):
    normal: Normal
    pairs: int


class _Down:
    """The down projections of a layer as they are stored: read, rounded, written."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, stored: Stored) -> None:
        self._checkpoint = checkpoint
        self._name = prefix + stored.name
        self._stored = stored
        self._kind = checkpoint.entries[self.name(0)].dtype

    def name(self, expert: int) -> str:
        """The tensor on disk that the expert's lies in."""
        return self._name.replace("{e}", str(expert))

    def weight(self, expert: int) -> torch.Tensor:
        """(hidden, width) float32."""
        tensor = self._checkpoint.tensor(self.name(expert))
        part = tensor[expert] if self._stored.fused else tensor
        return (part.mT if self._stored.turned else part).float()

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(DTYPES[self._kind]).float()

    def write(self, path: Path, experts: int, changes: np.ndarray) -> None:
        """The healed tensors by their names on disk, an expert at a time: of a fused one NAME#EXPERT."""
        names = [f"{self.name(e)}#{e}" if self._stored.fused else self.name(e) for e in range(experts)]
        shape = changes.shape[1:][::-1] if self._stored.turned else changes.shape[1:]
        slots = [Slot(name, self._kind, shape) for name in names]
        healed = (self.weight(e) + torch.from_numpy(np.array(changes[e])) for e in range(experts))
        stored = ((w.mT if self._stored.turned else w).to(DTYPES[self._kind]).contiguous() for w in healed)
        write_streamed(path, slots, stored, {})


def _compute(
    model: StreamedModel,
    forward: Forward,
    states: HiddenStates,
    index: int,
    batch: Batch,
    watcher: Any,
    store: bool = True,
) -> torch.Tensor:
    """One batch through layer ``index``; its states are stored unless it is a trial."""
    tokens = states.tokens
    hidden = states.read(index, batch.rows, batch.length).to(model.device, model.dtype)
    carried = states.read_carried(index, batch)
    mask = tokens.mask[batch.rows, : batch.length]
    given = None if mask.all() else torch.from_numpy(np.ascontiguousarray(mask)).to(model.device)
    if watcher is not None:
        watcher.batch(batch.rows, batch.length, given)
    ids = _ids(tokens, batch)
    result = forward(hidden, given, watcher, ids, None if carried is None else carried.to(model.device))
    if store:
        states.write(index + 1, batch, result)
        states.write_carried(index + 1, batch, model.carried)
    return result


def _ids(tokens: Tokens, batch: Batch) -> torch.Tensor:
    return torch.from_numpy(tokens.input_ids[batch.rows, : batch.length].astype(np.int64))
