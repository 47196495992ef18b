"""The observation pass: one streamed forward that leaves a scores file, and the reference of held-out text.

Resumable: every finished layer leaves ``layer-N.safetensors`` in the work folder beside the hidden states.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.atomic import atomic_path, make_folder, remove, require_room, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, read_header, write_copied
from reapc.errors import ReapcError
from reapc.observe.accumulate import Groups, LayerSums
from reapc.observe.combine import observed_entry
from reapc.observe.reference import write_reference
from reapc.observe.scores import Scores, load_scores, metadata_of
from reapc.progress import Progress
from reapc.stream import run
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


def router_digest(checkpoint: Checkpoint) -> str:
    """Identity of a model by its routers, whatever form its experts are stored in: sha256 of the router weights of all
    MoE layers in their order, as little-endian float32, (experts, hidden) each. A GGUF file has the same ones."""
    result = hashlib.sha256()
    for index in checkpoint.spec.moe_layers:
        layer = checkpoint.spec.layers[index]
        for group in layer.kind.tensors:
            if group.role == "router" and group.expert_axis == 0 and len(group.shape) == 1:
                weight = checkpoint.tensor(f"{layer.prefix}.{group.name}").float()
                result.update(np.ascontiguousarray(weight.numpy(), "<f4").data)
    return result.hexdigest()


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
    revision: str | None = None,
    shard: tuple[int, int] | None = None,
    out: Path | None = None,
) -> Scores:
    """Scores of ``checkpoint`` over ``calibration``; log-probabilities of ``held_out`` go to ``reference``.

    ``shard`` (k, n): only the k-th of n runs of whole batches; ``merge`` of all of them gives the scores of one run.
    ``out``: the scores file, written a layer at a time; without it they are returned in memory.
    ``work`` holds the hidden states and the layers done; it is removed at the end, and continued from when the
    same call was interrupted. ReapcError names a tensor with NaN or infinity; CannotBeDone says what room lacks.
    """
    from safetensors.numpy import load_file, save_file

    spec = checkpoint.spec
    groups, whole = Groups.of(calibration), calibration.digest
    source = calibration.source
    if shard:
        rows = calibration.shard(*shard, run.TOKENS_PER_BATCH)
        groups = groups.take(rows)
        calibration = calibration.take(np.arange(rows.start, rows.stop))
    identity = json.dumps(
        [checkpoint.digest, calibration.digest, held_out.digest if held_out else "", str(dtype), moments, shard]
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
            return LayerSums(0, 0, 0, moments, groups)
        places = expert_places(spec.layers[index].kind)
        return LayerSums(spec.num_experts, places.inputs, places.width, moments, groups)

    def layer_done(index: int, observer: LayerObserver | None) -> None:
        assert isinstance(observer, LayerSums)
        with atomic_path(work / f"layer-{index}.safetensors") as partial:
            save_file(observer.arrays(index), partial)

    run_layers(model, sets, observer_of, layer_done, progress, start_layer=done, name="observe")
    if held_out is not None and reference is not None:
        write_reference(reference, model, sets[1][0])
    header = {
        "model": model_name or checkpoint.folder.name,
        "revision": revision,
        "digest": checkpoint.digest,
        "router_digest": router_digest(checkpoint),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layers": list(spec.moe_layers),
        "tokens": calibration.count,
        "calibration": [source],
        "dtype": str(dtype).removeprefix("torch."),
        "domains": list(calibration.domains),
        "parts": groups.sums(calibration.mask.sum(axis=1)).tolist(),
        "sequences": groups.sums(np.ones(calibration.sequences)).tolist(),
        "observed": [observed_entry(source, whole, shard)],
    }
    layers = [work / f"layer-{index}.safetensors" for index in range(spec.num_layers)]
    if out is None:
        scores = Scores(header, {name: values for path in layers for name, values in load_file(path).items()})
    else:
        with atomic_path(out) as partial:
            write_copied(partial, _layer_tensors(layers), metadata_of(header))
        scores = load_scores(out)
    for layer, experts in scores.never_routed().items():
        progress.log(f"observe: layer {layer}: {len(experts)} experts were never routed to: {experts}")
    del sets
    remove(work)
    return scores


def _layer_tensors(layers: list[Path]) -> list[OutTensor]:
    """What the files of all layers hold, as it is copied into one."""
    return [
        OutTensor(entry.name, entry.dtype, entry.shape, path, ((entry.start, entry.end),))
        for path in layers
        for entry in read_header(path)[0].values()
    ]


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
