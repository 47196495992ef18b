"""Healing as it is offered: tokens split three ways, the pruned checkpoint refitted, and the result judged by the
model's own output. What healing made worse is not shipped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapc.checkpoint.atomic import claim_folder, make_folder, refuse_existing, remove, require_room
from reapc.checkpoint.reader import Checkpoint, listed
from reapc.errors import ReapcError
from reapc.progress import Progress
from reapc.prune.forms import Form
from reapc.prune.heal import HealedLayer, heal
from reapc.prune.rewrite import prune
from reapc.quantize.folder_form import FolderForm
from reapc.quantize.gguf_form import GgufForm
from reapc.quantize.gguf_view import view_bytes
from reapc.stream.tokens import Tokens
from reapc.verify.fidelity import Fidelity, compare

# Of 20 sequences of a domain: so many choose the strength of the refit, and so many report; the others are fitted.
_CHOICE, _REPORT, _OF = 3, 3, 20
_OWN_FOLDER = re.compile(r"^(identity|pruned|heal)(\.partial)?$")
TOP1_LOSS = 0.01  # top-1 that a healed model may lose


@dataclass(frozen=True)
class Healed:
    """What became of it: figures on the tokens that nothing was fitted to or chosen by, before and after."""

    layers: list[HealedLayer]
    before: Fidelity
    after: Fidelity

    @property
    def kept(self) -> bool:
        """Whether the result is the healed one."""
        return self.after.kl <= self.before.kl and self.after.top1 >= self.before.top1 - TOP1_LOSS

    def to_json(self) -> dict[str, Any]:
        return {
            "healed": self.kept,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "layers": [layer.__dict__ for layer in self.layers],
        }


def split(tokens: Tokens, seed: int = 0, what: str = "healing") -> tuple[Tokens, Tokens, Tokens]:
    """Sequences to fit, to choose by and to report on: disjoint, each with a share of every domain.

    ReapcError where a domain has too few for all three, which ``what`` needs."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    random = np.random.default_rng(seed)
    for number, name in enumerate(tokens.domains):
        mine = random.permutation(np.flatnonzero(tokens.domain == number))
        if not len(mine):
            continue
        few = max(1, len(mine) * _CHOICE // _OF)
        if len(mine) < 2 * few + 1:
            raise ReapcError(
                f"{len(mine)} sequences of {name}: {what} needs some to fit, some to choose by and some to report on",
                hint="give at least 3 sequences of every domain, better some hundreds",
            )
        for part, rows in zip(parts, (mine[2 * few :], mine[:few], mine[few : 2 * few]), strict=True):
            part.extend(rows.tolist())
    fit, choice, report = (tokens.take(np.sort(np.array(part, np.int64))) for part in parts)
    return fit, choice, report


def prune_and_heal(
    original: Checkpoint,
    kept: dict[int, list[int]],
    tokens: Tokens,
    work: Path,
    out: Path,
    progress: Progress,
    **settings: Any,
) -> tuple[int, Healed]:
    """Writes ``original`` with only the experts ``kept``, healed, to the folder ``out``; the bytes of its shards.

    ``settings``: see ``prune``. ``work`` holds the pruned checkpoint and what healing is resumed from."""
    refuse_existing(out)
    asked = {name: value for name, value in settings.items() if name != "values"}
    worth = {str(layer): values.tolist() for layer, values in (settings.get("values") or {}).items()}
    names = {str(layer): experts for layer, experts in kept.items()}
    model = [original.digest, original.side_digest]
    claim_folder(work, json.dumps([model, names, asked, worth, tokens.digest], sort_keys=True), _OWN_FOLDER)
    pruned = work / "pruned"
    if not pruned.is_dir():  # else left by an interrupted run
        prune(original, kept, pruned, progress, **settings)
    whole = Checkpoint(original.folder) if original.as_stored else original  # that can be computed with
    healed = heal_and_judge(whole, pruned, tokens, work / "heal", out, progress)
    remove(work)
    return sum(shard.stat().st_size for shard in Checkpoint(out).shards), healed


def heal_and_judge(
    original: Checkpoint, pruned: Path, tokens: Tokens, work: Path, out: Path, progress: Progress, **settings: Any
) -> Healed:
    """Writes ``pruned``, a checkpoint in 16 or 32 bit or in a packing that can be written (``FolderForm``), healed to
    the folder ``out``, or as it was where healing made it worse (KL, or top-1 by more than ``TOP1_LOSS``).
    ``settings``: see ``heal``."""
    return judged(original, FolderForm(Checkpoint(pruned)), pruned, tokens, work, out, progress, **settings)


def heal_quantized(
    original: Checkpoint,
    source: Path,
    result: Path,
    imatrix: Path | None,
    tokens: Tokens,
    work: Path,
    out: Path,
    progress: Progress,
    **settings: Any,
) -> Healed:
    """Writes ``result``, the GGUF file or the folder that the checkpoint ``source`` was quantized to (with
    ``imatrix``), healed to ``out``, or as it was where healing made it worse.

    The down projections of ``source`` are refitted to ``original`` beside all other weights as they are in ``result``,
    and rounded as they are stored there."""
    with _view(work) as view:
        form: Form
        if result.is_dir():
            form = FolderForm(Checkpoint(result), Checkpoint(source))
        else:
            require_room(view, view_bytes(original.spec), "a layer of the quantized model in float32")
            form = GgufForm(source, result, imatrix, view)
        found = judged(original, form, result, tokens, work, out, progress, **settings)
        if isinstance(form, GgufForm) and form.view.left:
            left = listed(sorted(form.view.left))
            progress.log(f"heal: taken as in 16 bit, because how they lie in the file is not known: {left}")
    return found


@contextmanager
def _view(work: Path) -> Iterator[Path]:
    """A folder beside ``work`` for what is made anew whenever it is needed."""
    view = work.with_name(work.name + ".view")
    remove(view)
    make_folder(view)
    try:
        yield view
    finally:
        remove(view)


def judged(
    original: Checkpoint,
    form: Form,
    unhealed: Path,
    tokens: Tokens,
    work: Path,
    out: Path,
    progress: Progress,
    **settings: Any,
) -> Healed:
    """Writes ``form`` healed to ``out``, or as it was where healing made it worse; ``unhealed``: where it lies."""
    fit, choice, report = split(tokens)
    layers = heal(original, form, fit, choice, work, out, progress, **settings)
    before, after = (compare(original.folder, path, report, progress) for path in (unhealed, out))
    result = Healed(layers, before, after)
    progress.log(
        f"heal: KL {result.before.kl:.4f} -> {result.after.kl:.4f}, top-1 {result.before.top1:.4f} -> "
        f"{result.after.top1:.4f} on {result.after.tokens} tokens that nothing was fitted to or chosen by"
    )
    if not result.kept:
        progress.log("heal: worse, so the result stays unhealed")
        remove(out)
        form.write([], out)
    return result
