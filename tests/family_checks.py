"""What is asked of every family, on a tiny model of it: tests run these, and tools/families_table.py writes what came
out to docs/families.md."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gqa_models
import mla_models
import numpy as np
import sliding_models
import torch
from family_models import CONFIGS, make
from torch import nn

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.observe.scores import Scores
from reapc.progress import Progress
from reapc.prune.criteria import choose, expert_values, groups_of
from reapc.prune.rewrite import prune
from reapc.quantize.gguf import lacks_mtp
from reapc.stream import StreamedModel
from reapc.stream.experts import LayerObserver, RoutedPairs, find_experts
from reapc.stream.skeleton import auto_class, make_config
from reapc.stream.tokens import Tokens

DEMO = Path(__file__).resolve().parent.parent / "demo" / "model"
LENGTH, PADDED = 24, 6


class Quiet(Progress):
    """Says nothing, counts nothing."""

    def log(self, text: str) -> None: ...

    @contextmanager
    def task(self, *_: Any) -> Any:
        yield lambda count: None


def ids_of(vocabulary: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, LENGTH) ids and their mask; the last row ends in padding."""
    ids = torch.randint(3, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    mask[-1, -PADDED:] = False
    return ids, mask


def tokens_of(vocabulary: int, rows: int = 6) -> Tokens:
    ids, mask = ids_of(vocabulary, rows)
    return Tokens(
        torch.where(mask, ids, 0).numpy().astype(np.int32), mask.numpy(), np.zeros(rows, np.int32), ("all",), "random"
    )


def whole_log_probs(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """transformers' own (batch, length, vocabulary)."""
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1)


def streamed_log_probs(model: StreamedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same, a layer at a time."""
    hidden, carried = model.embed(ids), None
    for index in range(model.spec.num_layers):
        with model.layer(index) as forward:
            hidden = forward(hidden, mask, None, ids, carried)
            carried = model.carried
    with torch.inference_mode():
        return torch.stack([model.head(row) for row in hidden])


class RoutedSum(LayerObserver):
    """Sums gate weight x output over all pairs, as they are recorded."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.pairs = 0

    def routed(self, pairs: RoutedPairs) -> None:
        self.total = self.total + (pairs.outputs.double() * pairs.gate.double()[:, None]).sum(0)
        self.pairs += len(pairs.gate)


def body_of(model: Any) -> Any:
    body = model.get_decoder()
    return body if hasattr(body, "layers") else body.model


def routed_of_block(model: Any, index: int, experts: int, ids: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of what layer ``index``'s experts add to its block's output, by transformers' own forward:
    the block as it is less the block with experts that give nothing."""
    layer = body_of(model).layers[index]
    path, module = find_experts(layer, experts)
    block = layer.get_submodule(path.rpartition(".")[0])
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen["args"], seen["kwargs"] = args, kwargs

    alone = block is layer  # Gemma-4: no module of its own; there nothing is done to the sum before a norm
    hook = (module if alone else block).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
        hook.remove()
        target = module if alone else block
        whole = _first(target(*seen["args"], **seen["kwargs"]))
        if alone:
            return whole.reshape(-1, whole.shape[-1]).double().sum(0)
        off = module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        rest = _first(target(*seen["args"], **seen["kwargs"]))
        off.remove()
    difference = (whole - rest).reshape(-1, whole.shape[-1])
    return difference.double().sum(0)


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def recorded_sum(checkpoint: Checkpoint, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, int]]:
    """(sum of recorded weight x output, pairs) of every MoE layer."""
    model = StreamedModel(checkpoint)
    hidden, carried = model.embed(ids), None
    found = {}
    for index in range(model.spec.num_layers):
        observer = RoutedSum()
        with model.layer(index) as forward:
            hidden = forward(hidden, None, observer, ids, carried)
            carried = model.carried
        if model.spec.layers[index].is_moe:
            assert isinstance(observer.total, torch.Tensor)
            found[index] = (observer.total, observer.pairs)
    return found


@dataclass
class Pruned:
    """What a family's observation and prune left."""

    checkpoint: Checkpoint
    scores: Scores
    kept: int
    folder: Path


def observe_and_prune(folder: Path, work: Path) -> Pruned:
    """Observes the checkpoint and writes one with fewer experts beside it."""
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    scores = observe(checkpoint, tokens_of(spec.vocab_size), work / "work", Quiet())
    groups = groups_of(spec)
    kept = max(spec.top_k + (spec.num_experts > spec.top_k), spec.num_experts * 2 // 3)
    kept -= kept % spec.n_group
    chosen = choose(scores, "reap", kept, groups)
    prune(checkpoint, chosen, work / "pruned", Quiet(), values=expert_values(scores, "reap"))
    return Pruned(checkpoint, scores, kept, work / "pruned")


def reload(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a checkpoint, fp32, and what it says of its keys."""
    checkpoint = Checkpoint(folder)
    config = make_config(checkpoint)
    if checkpoint.spec.family == "kimi_k25":  # transformers does not read the published names of the tower's keys
        config = mla_models.transformers_config(checkpoint.config)
    auto = auto_class(config)
    model, said = auto.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    return model.eval(), said


def prepared(name: str, root: Path) -> tuple[Path, Any]:
    """The tiny checkpoint of a family, and transformers' model of it."""
    folder = root / name.replace(" ", "_")
    folder.mkdir(parents=True)
    return folder, make(name, folder)


def converter_says(folders: dict[str, Path]) -> dict[str, str]:
    """What llama.cpp's converter makes of each checkpoint: "yes" where it writes just the tensors that the planner
    counts, else its own words, or what differs."""
    found = {}
    for name, folder in folders.items():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / file, folder)
        if lacks_mtp(folder):
            (folder / "no_mtp").touch()
        if own := sliding_models.CONVERTERS_OWN.get(name):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **own}))
    made = gqa_models.convert(folders)
    for name, folder in folders.items():  # the planner reads the model_type as published
        if own := sliding_models.CONVERTERS_OWN.get(name):
            config = json.loads((folder / "config.json").read_text())
            kept = {key: value for key, value in config.items() if key not in own or key == "model_type"}
            (folder / "config.json").write_text(json.dumps({**kept, "model_type": CONFIGS[name]["model_type"]}))
    for name, said in made.items():
        checkpoint = Checkpoint(folders[name])
        if checkpoint.spec.gguf_arch is None:
            found[name] = "llama.cpp does not know the family"
        elif "error" in said:
            found[name] = said["error"]
        else:
            wanted = {part: list(shape) for part, shape in gqa_models.gguf_shapes(checkpoint.spec).items()}
            seen = {part: list(shape) for part, (shape, _) in said["tensors"].items()}
            missing = sorted(wanted.keys() ^ seen.keys())
            other = sorted(part for part in wanted.keys() & seen.keys() if wanted[part] != seen[part])
            found[name] = "yes" if not missing and not other else f"differs: {', '.join([*missing, *other][:3])}"
    return found


COLUMNS = ("inspect", "observe", "gate weight", "prune", "reload", "GGUF")


def same_names(checkpoint: Checkpoint) -> bool:
    """Whether the spec expands to the very tensors and shapes on disk (vision and MTP aside)."""
    on_disk = {name: tuple(entry.shape) for name, entry in checkpoint.entries.items()}
    return all(on_disk.get(tensor.name) == tensor.shape for tensor in checkpoint.spec.tensors())


def streams_alike(folder: Path, model: Any) -> bool:
    """Whether the streamed pass gives transformers' log-probabilities (a padded sequence among them)."""
    checkpoint = Checkpoint(folder)
    ids, mask = ids_of(checkpoint.spec.vocab_size)
    whole = whole_log_probs(model, ids, mask)
    streamed = streamed_log_probs(StreamedModel(checkpoint), ids, mask)
    return bool(whole[mask].std() > 0.5 and (whole - streamed)[mask].abs().max() < 1e-4)


def weighs_alike(name: str, folder: Path, model: Any) -> bool:
    """Whether the sum of recorded weight x output is what the experts add to their block's output, in every layer."""
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    ids, _ = ids_of(spec.vocab_size)
    for index, (total, pairs) in recorded_sum(checkpoint, ids).items():
        if name == "nemotron_h_moe":  # its experts work in a latent space: what they sum to is projected back
            total = body_of(model).layers[index].mixer.fc2_latent_proj(total.float()).double()
        expected = routed_of_block(model, index, spec.num_experts, ids)
        scale = expected.abs().max()
        if pairs != ids.numel() * spec.top_k or scale < 1e-2 or (total - expected).abs().max() > 2e-4 * scale:
            return False
    return True


def reloads(pruned: Pruned) -> bool:
    """Whether transformers loads what was pruned with every key in its place, and computes what is streamed of it."""
    model, said = reload(pruned.folder)
    return not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")) and streams_alike(
        pruned.folder, model
    )
