"""The observation pass: one streamed forward that leaves a scores file, and the reference of held-out text.

Resumable: every finished layer leaves ``layer-N.safetensors`` in the work folder beside the hidden states.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import atomic_path, claim_folder, make_folder, remove, require_room, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, read_header, write_copied
from reapc.observe.accumulate import PARTS, ROUTING, Groups, LayerSums
from reapc.observe.combine import observed_entry
from reapc.observe.reference import write_reference
from reapc.observe.scores import Scores, load_scores, metadata_of
from reapc.progress import Progress
from reapc.stream import run
from reapc.stream.budget import MemoryPlan, plan_pass
from reapc.stream.devices import devices_of
from reapc.stream.expert_weights import expert_places
from reapc.stream.experts import LayerObserver
from reapc.stream.families import carried_width, streams
from reapc.stream.memory import Memory
from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates, run_layers, states_of
from reapc.stream.tokens import Tokens


def disk_bytes(checkpoint: Checkpoint, calibration: Tokens, held_out: Tokens | None) -> int:
    """Bytes that the hidden states, and what else travels between layers, take on disk while the pass runs."""
    width = checkpoint.spec.hidden_size * streams(checkpoint.spec, checkpoint.config)
    carried = carried_width(checkpoint.spec, checkpoint.config)
    return sum(HiddenStates.disk_bytes(tokens, width, carried) for tokens in (calibration, held_out) if tokens)


def sums_bytes(spec: ModelSpec, domains: int, moments: bool) -> int:
    """Bytes of all layers' sums in float64: once in the files of the layers, and once in the scores file."""
    total = 0
    for layer in spec.layers:
        routing = domains * PARTS * spec.num_experts * len(ROUTING) if layer.is_moe else 0
        total += routing + 2048  # the header of its file
        if moments:
            places = expert_places(layer.kind) if layer.is_moe else None
            inputs = sum(
                linear[1] for group in layer.kind.tensors if group.role != "expert" for linear in group.linears
            )
            experts = spec.num_experts * (places.inputs + places.width) if places else 0
            # queries of latent attention beside the linears' inputs: never more than these
            total += domains * (experts + 2 * inputs)
    return 8 * total


# What a run leaves here; a kill while it is removed may leave some of it without the stamp.
_OWN_FILE = re.compile(r"^(identity|batch|layer-\d+\.safetensors)(\.partial)?$|^hidden-[a-z-]+-[01]\.bin$")


def _finished_layers(work: Path, identity: str) -> int:
    """How many layers an interrupted run of the same observation has left here; anything else is removed."""
    claim_folder(work, identity, _OWN_FILE)
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
    memory: Memory | None = None,
    moments: bool = True,
    model_name: str = "",
    revision: str | None = None,
    shard: tuple[int, int] | None = None,
    out: Path | None = None,
) -> Scores:
    """Scores of ``checkpoint`` over ``calibration``; log-probabilities of ``held_out`` go to ``reference``.

    ``shard`` (k, n): only the k-th of n runs of whole batches; ``merge`` of all of them gives the scores of one run.
    ``out``: the scores file, written a layer at a time; without it they are returned in memory.
    ``device``: a list ("cuda:0,cuda:1") takes turns, each loading its next layer while another computes.
    ``memory``: a bound on anonymous memory, or none; what is predicted is set there. A bound that is too small for
    whole batches cuts them, which can change the last bits of sums; nothing else that it does changes a result.
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
    done = _finished_layers(work, identity)
    if not done:
        sums = sums_bytes(spec, groups.domains, moments)
        needed = disk_bytes(checkpoint, calibration, held_out) + sums
        together = out is not None and work.stat().st_dev == _folder_of(out).stat().st_dev
        require_room(work, needed + (sums if together else 0), "the hidden states and sums of the observation")
        if out is not None and not together:
            require_room(out.parent, sums, "the scores file")
    else:
        progress.log(f"observe: {done} of {spec.num_layers} layers were done before; going on")
    models = [StreamedModel(checkpoint, dtype, one) for one in devices_of(device)]
    model = models[0]
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

    memory = memory or Memory()
    if done < spec.num_layers:
        plan = _plan(models, sets, observer_of, memory, work, progress)
        run_layers(models, sets, observer_of, layer_done, progress, start_layer=done, name="observe", plan=plan)
    if held_out is not None and reference is not None:
        write_reference(reference, model, sets[1][0], memory)
    checkpoint.check_unchanged()
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
    # of one shard alone it would say nothing
    for layer, experts in scores.never_routed().items() if shard is None else ():
        progress.log(f"observe: layer {layer}: {len(experts)} experts were never routed to: {experts}")
    del sets
    remove(work)
    return scores


def _plan(
    models: Sequence[StreamedModel],
    sets: Sequence[tuple[HiddenStates, bool]],
    observer_of: Callable[[int], LayerSums],
    memory: Memory,
    work: Path,
    progress: Progress,
) -> MemoryPlan:
    """How the bound of ``memory`` is kept. A run that was interrupted goes on with batches of the same size."""
    stamp = work / "batch"
    batches = [(states.tokens, batch) for states, _ in sets for batch in run.batches_of(states.tokens)]
    plan = plan_pass(models, batches, observer_of, memory, int(stamp.read_text()) if stamp.is_file() else None)
    if not stamp.is_file():
        write_text(stamp, str(plan.tokens_per_batch))
    whole = max(batch.tokens for _, batch in batches)
    if plan.tokens_per_batch < whole:
        progress.log(f"observe: batches of {plan.tokens_per_batch} tokens, {whole} do not fit in the memory")
    return plan


def _folder_of(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


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
    require_room(work, disk_bytes(checkpoint, held_out, None), "the hidden states")
    model = StreamedModel(checkpoint)
    model.check_outer()
    states = states_of(model, held_out, work, "held-out")
    run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, progress, name="reference")
    checkpoint.check_unchanged()
    write_reference(out, model, states)
    del states
    remove(work)
