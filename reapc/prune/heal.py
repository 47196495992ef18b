"""Healing: the surviving experts' down projections refitted in closed form, so that each layer's output comes back to
the original's. Two streams run side by side, a layer at a time: the original model, and the pruned one with every layer
before already healed, its weights rounded as they are stored. No gradients, no new tensors.

What a layer lacks at a token, R = original output - pruned output, is to be met by sum over chosen experts of
gate weight x (change of its down projection) x activation; tokens weigh by the size of their state (heal_sides.py).
The experts take turns (block coordinate descent), each by ridge least squares over the tokens routed to it (refit.py).
Another set of sequences chooses the strength of each, and whether the layer keeps its refit at all.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.atomic import atomic_path, claim_folder, refuse_existing, remove, require_room, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Progress
from reapc.prune.down import Down
from reapc.prune.forms import Form
from reapc.prune.heal_sides import RoutedTotal, Side, disk_bytes
from reapc.prune.refit import Basis, basis_of, solve
from reapc.stream.expert_weights import Expert, ExpertPlaces, expert_places
from reapc.stream.experts import StreamedExperts
from reapc.stream.families import FAMILIES
from reapc.stream.model import Forward, StreamedModel
from reapc.stream.run import compute_batch, ids_of
from reapc.stream.tokens import Batch, Tokens

SWEEPS = 2
LEAST_GAIN = 0.02  # of what is lacking, for another sweep to be worth it
_OWN_FILE = re.compile(r"^(identity|layer-\d+\.(json|safetensors))(\.partial)?$|^[a-z-]+(-[01])?\.bin$")


@dataclass(frozen=True)
class HealedLayer:
    """What the layer lacks, as a share of the original's output (mean square, by token): ``fit`` on the tokens fitted,
    ``choice`` on the others, (before, after). ``kept``: whether the refit stays; ``changed``: how many of the experts
    it changes."""

    layer: int
    fit: tuple[float, float]
    choice: tuple[float, float]
    kept: bool
    changed: int


def heal(
    original: Checkpoint,
    form: Form,
    fit: Tokens,
    choice: Tokens,
    work: Path,
    out: Path,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[HealedLayer]:
    """Writes ``form``, the pruned or quantized model, with its experts' down projections refitted to ``original`` to
    ``out``, atomically.

    ``fit``: tokens that are fitted; ``choice``: others, which choose. ``work`` holds what is resumed from, and is
    removed at the end. CannotBeDone for a family whose layers do not simply add what their experts give, and where the
    room lacks."""
    pruned = form.checkpoint
    spec = pruned.spec
    if (spec.hidden_size, spec.num_layers) != (original.spec.hidden_size, original.spec.num_layers):
        raise ReapcError(
            f"{pruned.folder}: {spec.num_layers} layers of {spec.hidden_size} channels, the original in "
            f"{original.folder} has {original.spec.num_layers} of {original.spec.hidden_size}",
            hint="heal a pruned checkpoint with the model that it was pruned from",
        )
    refuse_existing(out)
    claim_folder(work, json.dumps([original.digest, form.digest, fit.digest, choice.digest, str(dtype)]), _OWN_FILE)
    # all healed projections are among the pruned bytes; of one layer, changes and bases are kept in float32, and what
    # is written of coarse ones
    hidden, width = spec.hidden_size, spec.expert_intermediate_size
    room = sum(disk_bytes(tokens, hidden, spec.top_k, width) for tokens in (fit, choice))
    room += 4 * spec.num_experts * width * (hidden + 2 * width + 1) + form.bytes
    require_room(work, room, "the states, activations and changes of healing")
    require_room(out.parent, form.bytes, "the healed checkpoint")
    models = StreamedModel(original, dtype, device), StreamedModel(pruned, dtype, device)
    reports = Healing(*models, fit, choice, work, progress, form).run()
    original.check_unchanged()
    form.write(sorted(work.glob("layer-*.safetensors")), out)
    form.check_unchanged()
    remove(work)
    return reports


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
        form: Form,
    ) -> None:
        self.original, self.pruned, self.form = original, pruned, form
        self.work, self.progress = work, progress
        self.fit = Side("fit", fit, original, pruned, work)
        self.choice = Side("choice", choice, original, pruned, work)
        self.sides = (self.fit, self.choice)

    def run(self) -> list[HealedLayer]:
        """Heals the layers that are not done yet; the reports of all that have experts."""
        layers = self.pruned.spec.num_layers
        tokens = sum(batch.tokens for side in self.sides for batch in side.batches())
        start = 0
        while self._report(start).is_file():
            start += 1
        if start:
            self.progress.log(f"heal: {start} of {layers} layers were done before; going on")
        with self.progress.task("heal", tokens * (layers - start), "tokens x layers") as advance:
            if not start:
                self._embed()
            for index in range(start, layers):
                done = self._layer(index)
                for side in self.sides:
                    side.original.flush()
                    side.pruned.flush()
                write_text(self._report(index), json.dumps(asdict(done) if done else None))
                advance(tokens)
        found = (json.loads(self._report(index).read_text()) for index in range(layers))
        return [HealedLayer(**{**r, "fit": tuple(r["fit"]), "choice": tuple(r["choice"])}) for r in found if r]

    def _report(self, index: int) -> Path:
        return self.work / f"layer-{index}.json"

    def _embed(self) -> None:
        for side in self.sides:
            for batch in side.batches():
                ids = ids_of(side.tokens, batch)
                side.original.write(0, batch, self.original.embed(ids))
                side.pruned.write(0, batch, self.pruned.embed(ids))  # its embeddings may be quantized

    def _layer(self, index: int) -> HealedLayer | None:
        """Both models' layer ``index``; healed where it has experts."""
        with self.original.layer(index) as forward:
            for side in self.sides:
                for batch in side.batches():
                    compute_batch(self.original, forward, index, side.original, batch, None)
        layer = self.pruned.load(index)
        with self.pruned.computing(layer) as forward:
            places = None
            if layer.experts is not None:
                kind, transposed = self.pruned.spec.layers[index].kind, FAMILIES[self.pruned.spec.family].transposed
                places = expert_places(kind, transposed)
                self._check_adds(index, forward, layer.experts)
            for side in self.sides:
                watcher = side.watch(places.inputs) if places else None
                for batch in side.batches():
                    compute_batch(self.pruned, forward, index, side.pruned, batch, watcher)
            layer.finish()
            if layer.experts is None or places is None:
                return None
            for side in self.sides:
                side.compare(index)
            return self._heal(index, layer.experts, places)

    def _check_adds(self, index: int, forward: Forward, experts: StreamedExperts) -> None:
        """CannotBeDone unless the layer's output is that without the experts, plus the sum that is recorded; tried on
        one sequence, whose states are written again afterwards."""
        states = self.fit.pruned
        batch = Batch(slice(0, 1), int(self.fit.tokens.lengths[0]))
        routed = RoutedTotal(torch.zeros(batch.length, self.pruned.spec.hidden_size, device=self.pruned.device))
        compute_batch(self.pruned, forward, index, states, batch, routed)
        whole = states.read(index + 1, batch.rows, batch.length)
        muted = experts.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        try:
            compute_batch(self.pruned, forward, index, states, batch, None)
        finally:
            muted.remove()
        added, recorded = whole - states.read(index + 1, batch.rows, batch.length), routed.total.cpu()
        if added.numel() == recorded.numel():
            wrong = float((added.reshape(recorded.shape) - recorded).norm())
            if wrong <= 1e-2 * float(recorded.norm()) + 1e-6:
                return
        raise CannotBeDone(
            f"{self.pruned.checkpoint.folder}: layer {index} of {self.pruned.spec.family} does not simply add what its "
            "experts give (a norm, a projection or several residual streams stand between)",
            hint="healing is not known for this family in this version; prune without",
        )

    def _heal(self, index: int, experts: StreamedExperts, places: ExpertPlaces) -> HealedLayer:
        """Refits the experts of the layer, and stores what it gives then for the next one."""
        spec = self.pruned.spec
        down = self.form.down(index, self.work)
        shape = (spec.num_experts, spec.hidden_size, places.width)
        changes = np.memmap(self.work / "changes.bin", np.float32, "w+", shape=shape)
        bases = self._bases(experts, places.width)
        for expert in bases if down.coarse else ():
            changes[expert] = down.made(expert).numpy()
        before = [side.error() for side in self.sides]
        lacks = before[1]
        for _ in range(SWEEPS):
            for expert, basis in bases.items():
                self._visit(expert, basis, changes[expert], down)
            last, lacks = lacks, self.choice.error()
            if lacks > (1 - LEAST_GAIN) * last:
                break
        after = [side.error() for side in self.sides]
        changed = down.changed(changes)
        kept = bool(changed) and after[1] < before[1]
        healed = self.work / f"layer-{index}.safetensors"
        remove(healed)  # what a run that was killed here may have left
        if kept:
            for side in self.sides:
                side.keep(index)
            with atomic_path(healed) as partial:
                down.write(partial, changes)
        return HealedLayer(index, (before[0], after[0]), (before[1], after[1]), kept, changed)

    def _bases(self, experts: StreamedExperts, width: int) -> dict[int, Basis]:
        """What does not change over the sweeps, mapped from disk, of the experts that tokens of both sets were sent to;
        the activations of all are kept by the sides. The others stay as they are."""
        count = self.pruned.spec.num_experts
        for side in self.sides:
            side.begin(count, width)
        values = np.zeros((count, width), np.float32)
        shape = (count, 2, width, width)
        kept = np.memmap(self.work / "bases.bin", np.float32, "w+", shape=shape)
        found: dict[int, Basis] = {}
        for expert in range(count):
            part = experts.store.get(expert)

            def activated_by(inputs: np.ndarray, part: Expert = part) -> torch.Tensor:
                with torch.inference_mode():
                    given = torch.from_numpy(inputs).to(self.pruned.device, self.pruned.dtype)
                    return experts.activated_by(given, part).float().cpu()

            for side in self.sides:
                side.activate(expert, activated_by)
            grams = [_gram(side, expert) for side in self.sides]
            if grams[0] is None or grams[1] is None:
                continue
            pairs = None
            if sum(len(places) for places, _ in self.fit.gated(expert)) < width:
                pairs = torch.cat([gated for _, gated in self.fit.gated(expert)]).double()
            basis = basis_of(grams[0], grams[1], pairs)
            values[expert], kept[expert, 0], kept[expert, 1] = (part.float().numpy() for part in basis)
            found[expert] = Basis(*(torch.from_numpy(part) for part in (values[expert], *kept[expert])))
        return found

    def _visit(self, expert: int, basis: Basis, change: np.ndarray, down: Down) -> None:
        """One expert's turn: ``change`` (hidden, width) becomes what is best given all others, rounded as it is
        stored. Coarse rounding is taken only where the tokens that choose lack less with it."""
        old = torch.from_numpy(np.array(change))
        # rounding errors lie outside of what few tokens span, which is all that a basis knows of
        apart = old if down.coarse else None
        right, other = (_right(side, expert, apart) for side in self.sides)
        found = solve(basis, right, other, None if down.coarse else old)
        stored = down.weight(expert)
        new, packed = down.rounded(expert, stored + found.change, basis)
        new -= stored
        step = (new - old).T
        if down.coarse and self.choice.cost(expert, step) >= 0:
            return
        down.keep(expert, packed)
        change[:] = new.numpy()
        for side in self.sides:
            for places, gated in side.gated(expert):
                side.lower(places, gated @ step)


def _gram(side: Side, expert: int) -> torch.Tensor | None:
    """Z^T Z (width, width) float64 of one expert; None where no token was sent to it."""
    total: torch.Tensor | None = None
    for _, gated in side.gated(expert):
        own = (gated.T @ gated).double()
        total = own if total is None else total + own
    return total


def _right(side: Side, expert: int, made: torch.Tensor | None = None) -> torch.Tensor:
    """Z^T R (width, hidden) of an expert that tokens were sent to; ``made`` (hidden, width): without this change."""
    total = torch.zeros(())
    for places, gated in side.gated(expert):
        lacking = side.lacking_at(places)
        total = total + gated.T @ (lacking if made is None else lacking + gated @ made.T)
    return total
