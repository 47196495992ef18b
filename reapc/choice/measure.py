"""The measured choice of a pruning criterion, from scores and calibration text to the experts that stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reapc.checkpoint.atomic import claim_folder, require_room, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.choice.decide import Decision, decide
from reapc.choice.finalists import EndFigures, end_figures
from reapc.choice.pruned_layer import PrunedLayers
from reapc.choice.samples import FINALISTS, Samples, samples_of
from reapc.choice.super_experts import super_experts
from reapc.choice.survey import GREEDY, Question, Survey, SurveyedLayer
from reapc.observe.observe import disk_bytes
from reapc.observe.scores import Scores
from reapc.progress import Progress
from reapc.prune.criteria import CRITERIA, best_of, expert_values, groups_of
from reapc.stream.model import StreamedModel
from reapc.stream.tokens import Tokens

Masks = dict[int, list[int]]
_OWN_FOLDER = re.compile(r"^(identity|survey|finalists|choice\.json)(\.partial)?$")


@dataclass(frozen=True)
class Choice:
    """``kept``: the experts that stay, by layer (MTP layers too, where scores speak of them), and ``figures`` what JSON
    says of how they were chosen."""

    winner: str
    kept: Masks
    figures: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a user has to know, in words."""
        said = [f"{self.winner} wins: {self.figures['why']}"]
        for name, own in self.figures["candidates"].items():
            end = f", KL {own['kl']:.5f}, top-1 {own['top1']:.4f}" if "kl" in own else ""
            same = f", the same experts as {own['same_as']}" if "same_as" in own else ""
            said.append(f"{name}: {100 * own['layer_error']:.2f} % of a layer's routed output lost{end}{same}")
        said += [f"{name} is left out: {why}" for name, why in self.figures["left_out"].items()]
        for layer, experts in self.figures["protected"].items():
            said.append(f"layer {layer}: super experts, protected: {', '.join(experts)}")
        return said

    def save(self, path: Path) -> None:
        kept = {str(layer): experts for layer, experts in self.kept.items()}
        write_text(path, json.dumps({"winner": self.winner, "kept": kept, "figures": self.figures}) + "\n")

    @staticmethod
    def load(path: Path) -> Choice:
        found = json.loads(path.read_text())
        return Choice(found["winner"], {int(i): kept for i, kept in found["kept"].items()}, found["figures"])


def masks_of(scores: Scores, criterion: str, kept: int, groups: int, protected: Mapping[int, list[int]]) -> Masks:
    """What ``criterion`` keeps in each observed layer, ``protected`` experts before all others."""
    found = {}
    for layer, values in expert_values(scores, criterion).items():
        guarded = np.asarray(values, np.float64).copy()
        guarded[protected.get(layer, [])] = np.inf
        found[layer] = best_of(guarded, kept, groups)
    return found


def choose_measured(
    checkpoint: Checkpoint,
    scores: Scores,
    kept: int,
    tokens: Tokens,
    work: Path,
    progress: Progress,
    *,
    dissolve_groups: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Choice:
    """Which criterion's ``kept`` experts lose least, measured on ``tokens`` (calibration text, never what results are
    reported on). ReapcError where these are too few. ``work`` is continued from when the same call was interrupted, and
    keeps the result until the caller removes it."""
    parts = samples_of(tokens, seed)
    spec, groups = checkpoint.spec, groups_of(checkpoint.spec, dissolve_groups)
    extreme = super_experts(scores)
    protected = _protected(extreme, kept, groups, spec.num_experts)
    candidates = {name: masks_of(scores, name, kept, groups, protected) for name in CRITERIA}
    values = expert_values(scores, "reap")
    identity = [
        checkpoint.digest,
        tokens.digest,
        str(dtype),
        dissolve_groups,
        {str(i): e for i, e in protected.items()},
    ]
    identity.append({name: {str(i): e for i, e in found.items()} for name, found in candidates.items()})
    claim_folder(work, json.dumps(identity), _OWN_FOLDER)
    if (done := work / "choice.json").is_file():
        return Choice.load(done)
    room = (2 + FINALISTS) * disk_bytes(checkpoint, parts.decide, None)
    room += sum(disk_bytes(checkpoint, part, None) for part in (parts.sample, parts.select))
    require_room(work, room, "the hidden states of the choice")
    model = StreamedModel(checkpoint, dtype, device)
    pruner = PrunedLayers(model, kept, dissolve_groups, values)
    question = Question(candidates, kept, groups, dissolve_groups, protected, values)
    layers = Survey(model, question, pruner, parts.sample, parts.select, work / "survey", progress).run()
    refused = next((one for one in layers if one.left_out), None)
    left_out = {GREEDY: f"{spec.family}, layer {refused.layer}: {refused.left_out}"} if refused else {}
    if not left_out:
        greedy = {one.layer: one.greedy for one in layers if one.greedy is not None}
        candidates[GREEDY] = {**candidates["reap"], **greedy}  # of MTP layers: those of reap
    errors = {name: _relative(layers, name) for name in candidates}
    ranked = sorted(candidates, key=lambda name: float(np.mean(list(errors[name].values()))))
    finalists, same = _finalists(ranked, candidates, spec.moe_layers)
    end = end_figures(
        model, pruner, {n: candidates[n] for n in finalists}, parts.decide, work / "finalists", progress
    )  # fmt: skip
    checkpoint.check_unchanged()
    counts = parts.decide.mask.sum(axis=1).astype(np.float64)
    decision = decide(end, counts)
    figures = _figures(decision, errors, end, counts, same, parts)
    figures |= {
        "experts_kept": kept,
        "left_out": left_out,
        "protected": {
            str(layer): {str(e): extreme[layer][e] for e in experts} for layer, experts in protected.items()
        },
    }  # fmt: skip
    choice = Choice(decision.winner, candidates[decision.winner], figures)
    for line in choice.lines():
        progress.log(f"choice: {line}")
    choice.save(done)
    return choice


def _protected(found: Mapping[int, Mapping[int, float]], kept: int, groups: int, experts: int) -> Masks:
    """The super experts of each layer; of more than there is place for in a group, the largest."""
    chosen = {}
    for layer, own in found.items():
        line = np.full(experts, -np.inf)
        line[list(own)] = list(own.values())
        chosen[layer] = [expert for expert in best_of(line, kept, groups) if expert in own]
    return chosen


def _relative(layers: list[SurveyedLayer], name: str) -> dict[int, float]:
    """Squared error over the squared norm of what the experts give, by layer."""
    return {one.layer: sum(one.errors[name]) / max(sum(one.norms), 1e-300) for one in layers}


def _finalists(
    ranked: list[str], candidates: Mapping[str, Masks], layers: tuple[int, ...]
) -> tuple[list[str], dict[str, str]]:
    """reap, greedy removal (its loss is a relative one: it can be worse by the error of layers, and better in the end),
    and of the others the best, ``FINALISTS`` beside reap; and which candidate keeps the same experts as an earlier one.
    """
    order = ["reap", *(name for name in CRITERIA if name != "reap"), GREEDY]
    same: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in (name for name in order if name in candidates):
        key = json.dumps([candidates[name][layer] for layer in layers])
        if key in seen:
            same[name] = seen[key]
        seen.setdefault(key, name)
    others = [name for name in ranked if name not in same and name not in ("reap", GREEDY)]
    own = [GREEDY] if GREEDY in candidates and GREEDY not in same else []
    return ["reap", *own, *others[: FINALISTS - len(own)]], same


def _figures(
    decision: Decision,
    errors: Mapping[str, Mapping[int, float]],
    end: Mapping[str, EndFigures],
    counts: NDArray[np.float64],
    same: Mapping[str, str],
    parts: Samples,
) -> dict[str, Any]:
    candidates: dict[str, dict[str, Any]] = {}
    total = float(counts.sum())
    for name, by_layer in errors.items():
        own: dict[str, Any] = {
            "layer_error": float(np.mean(list(by_layer.values()))),
            "layer_errors": {str(layer): value for layer, value in by_layer.items()},
        }
        figures = end.get(same.get(name, name))
        if figures is not None:
            own |= {"kl": float(figures.kl.sum()) / total, "top1": float(figures.agree.sum()) / total}
        if name in same:
            own["same_as"] = same[name]
        if (against := decision.against_reap.get(name)) is not None:
            own["kl_less_reap"] = {"mean": against.kl, "interval": [against.low, against.high]}
        candidates[name] = own
    sizes = {name: {"sequences": p.sequences, "tokens": p.count} for name, p in parts._asdict().items()}
    return {"winner": decision.winner, "why": decision.why, "candidates": candidates, "measured_on": sizes}
