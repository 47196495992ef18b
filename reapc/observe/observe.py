"""The observation pass: one streamed forward that leaves a scores file, and the reference of held-out text.

Resumable: every finished layer leaves ``layer-N.safetensors`` in the work folder beside the hidden states.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.atomic import atomic_path, make_folder, remove, require_room, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.observe.accumulate import LayerSums
from reapc.observe.reference import write_reference
from reapc.observe.scores import Scores
from reapc.progress import Progress
from reapc.stream.expert_weights import expert_places
from reapc.stream.experts import LayerObserver
from reapc.stream.families import carried_width, streams
from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates, run_layers, states_of
from reapc.stream.tokens import Tokens


def disk_bytes(checkpoint: Checkpoint, calibration: Tokens, held_out: Tokens | None) -> int:
    """Bytes that the hidden states take on disk while the pass runs."""
    width = checkpoint.spec.hidden_size * streams(checkpoint.spec, checkpoint.config)
    carried = carried_width(checkpoint.spec, checkpoint.config)
    return sum(HiddenStates.disk_bytes(tokens, width, carried) for tokens in (calibration, held_out) if tokens)


# What a run leaves here; a kill while it is removed may leave some of it without the stamp.
_OWN_FILE = re.compile(r"^(identity|layer-\d+\.safetensors)(\.partial)?$|^hidden-[a-z-]+-[01]\.bin$")


def _finished_layers(work: Path, identity: str) -> int:
    """How many layers an interrupted run of the same observation has left here; anything else is removed."""
    stamp = work / "identity"
    if not stamp.is_file() and not all(_OWN_FILE.match(path.name) for path in work.iterdir()):
        raise ReapcError(
            f"{work}: this work folder holds something else, which is left untouched", hint="choose another --work"
        )
    if not stamp.is_file() or stamp.read_text() != identity:
        remove(work)
        make_folder(work)
        write_text(stamp, identity)
    count = 0
    while (work / f"layer-{count}.safetensors").is_file():
        count += 1
    return count


def observe(
    checkpoint: Checkpoint,
    calibration: Tokens,
    work: Path,
    progress: Progress,
    *,
    held_out: Tokens | None = None,
    reference: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    moments: bool = True,
    model_name: str = "",
) -> Scores:
    """Scores of ``checkpoint`` over ``calibration``; log-probabilities of ``held_out`` go to ``reference``.

    ``work`` holds the hidden states and the layers done; it is removed at the end, and continued from when the
    same call was interrupted. ReapcError names a tensor with NaN or infinity; CannotBeDone says what room lacks.
    """
    from safetensors.numpy import load_file, save_file

    spec = checkpoint.spec
    identity = json.dumps(
        [checkpoint.digest, calibration.digest, held_out.digest if held_out else "", str(dtype), moments]
    )
    make_folder(work)
    done = _finished_layers(work, identity)
    if not done:
        require_room(work, disk_bytes(checkpoint, calibration, held_out), "the hidden states of the observation")
    else:
        progress.log(f"observe: {done} of {spec.num_layers} layers were done before; going on")
    model = StreamedModel(checkpoint, dtype, device)
    model.check_outer()
    sets = [(states_of(model, calibration, work, "calibration"), True)]
    if held_out is not None:
        sets.append((states_of(model, held_out, work, "held-out"), False))

    def observer_of(index: int) -> LayerSums:
        if not spec.layers[index].is_moe:
            return LayerSums(0, 0, 0, moments)
        places = expert_places(spec.layers[index].kind)
        return LayerSums(spec.num_experts, places.inputs, places.width, moments)

    def layer_done(index: int, observer: LayerObserver | None) -> None:
        assert isinstance(observer, LayerSums)
        with atomic_path(work / f"layer-{index}.safetensors") as partial:
            save_file(observer.arrays(index), partial)

    run_layers(model, sets, observer_of, layer_done, progress, start_layer=done, name="observe")
    arrays: dict[str, np.ndarray] = {}
    for index in range(spec.num_layers):
        arrays |= load_file(work / f"layer-{index}.safetensors")
    if held_out is not None and reference is not None:
        write_reference(reference, model, sets[1][0])
    header = {
        "model": model_name or checkpoint.folder.name,
        "digest": checkpoint.digest,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layers": list(spec.moe_layers),
        "tokens": calibration.count,
        "calibration": [calibration.source],
        "dtype": str(dtype).removeprefix("torch."),
    }
    scores = Scores(header, arrays)
    for layer, experts in scores.never_routed().items():
        progress.log(f"observe: layer {layer}: {len(experts)} experts were never routed to: {experts}")
    del sets
    remove(work)
    return scores


def observe_reference(checkpoint: Checkpoint, held_out: Tokens, work: Path, out: Path, progress: Progress) -> None:
    """Only the reference log-probabilities of ``held_out``: for a build whose scores are given."""
    remove(work)
    make_folder(work)
    require_room(work, HiddenStates.disk_bytes(held_out, checkpoint.spec.hidden_size), "the hidden states")
    model = StreamedModel(checkpoint)
    model.check_outer()
    states = states_of(model, held_out, work, "held-out")
    run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, progress, name="reference")
    write_reference(out, model, states)
    del states
    remove(work)
