"""Calibration and held-out data: token ids from a file, or packed from text with the model's own tokenizer."""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reapc.errors import ReapcError
from reapc.mix import Mix, MixSource
from reapc.observe.corpora.logs import NoSample
from reapc.observe.corpora.pack import Packed, SourceReport, pack
from reapc.observe.corpora.presets import find_path, no_such_data, resolve
from reapc.observe.corpora.records import records
from reapc.observe.corpora.render import Renderer, load_tokenizer, loses_thoughts
from reapc.observe.corpora.samples import sample_of
from reapc.progress import Progress, Silent
from reapc.stream.tokens import Tokens, read_tokens

Data = str | tuple[MixSource, ...]


def load_data(
    folder: Path, data: Data, base: Path, length: int, limit: int, seed: int, vocab_size: int, **settings: Any
) -> Tokens:
    """``data`` of a recipe or command line as Tokens; see ``load_split``."""
    return load_split(folder, data, base, length, limit, 0, seed, vocab_size, **settings)[0]


def load_split(
    folder: Path,
    data: Data,
    base: Path,
    length: int,
    limit: int,
    held_out: int,
    seed: int,
    vocab_size: int,
    *,
    context: int | None = None,
    progress: Progress | None = None,
    reports: list[SourceReport] | None = None,
) -> tuple[Tokens, Tokens | None]:
    """``data`` of a recipe or command line for the model in ``folder``: calibration and held-out tokens (None where
    ``held_out`` is 0), which share no sample.

    A mix (a list of sources, a preset, a .toml, .jsonl or folder) makes exactly ``limit`` x ``length`` tokens, and
    ``held_out`` x ``length`` of other samples, in rows of one sample each; a path alone may have fewer, which is said.
    Token ids, one text file and "auto" make at most ``limit`` rows of ``length`` tokens; at most a third of their rows
    is held out. ``context``: the model's, which a row must not exceed. ``reports`` is given what each source of a mix
    gave."""
    progress = progress or Silent()
    if context is not None and length > context:
        raise ReapcError(
            f"sequences of {length} tokens (calibration.tokens, --length): the model's context is {context}",
            hint=f"at most {context}; longer samples are cut into several rows",
        )
    if isinstance(data, str) and data.endswith(".safetensors"):
        path = find_path(data, base)
        if path is None:
            raise no_such_data(data, base)
        return _split_rows(read_tokens(path, vocab_size), data, length, limit, held_out, seed)
    found = resolve(data, base)
    renderer = Renderer(load_tokenizer(folder, found.name if isinstance(found, Mix) else str(data)), folder)
    if isinstance(found, Mix):
        packed = pack_mix(renderer, found, length, limit * length, held_out * length, seed, progress)
        split = packed.tokens, packed.held_out
        if reports is not None:
            reports += packed.reports
    else:
        joined = _joined(renderer.tokenizer, found, length, limit + held_out, seed)
        split = _split_rows(joined, str(data), length, limit, held_out, seed)
    _check_vocabulary(split, folder, vocab_size)
    return split


def pack_mix(
    renderer: Renderer, mix: Mix, length: int, total: int, held_out: int, seed: int, progress: Progress
) -> Packed:
    """The mix in rows of at most ``length`` tokens: ``total`` tokens to calibrate with and ``held_out`` others."""
    lost: Counter[str] = Counter()
    encoded = [_encoded(renderer, mix, i, seed, lost) for i in range(len(mix.sources))]
    with progress.task(f"corpus {mix.name}", total + held_out, "tokens") as advance:
        packed = pack(mix, encoded, length, total, held_out, seed, advance)
    for report in packed.reports:
        progress.log(f"corpus: {report.line()}")
    for name, count in lost.items():
        progress.log(f"corpus: {name}: the chat template leaves out the thoughts of {count} samples' last messages")
    if packed.tokens.count < total:
        progress.log(f"corpus: {packed.tokens.count} tokens of the {total} asked for are all that {mix.name} has")
    return packed


def _encoded(
    renderer: Renderer, mix: Mix, i: int, seed: int, lost: Counter[str]
) -> Iterator[np.ndarray | NoSample]:  # fmt: skip
    """The samples of one source as ids; ``lost`` counts those whose thoughts the template leaves out."""
    source = mix.sources[i]
    for record in records(source, mix.base, seed):
        try:
            sample = sample_of(record, source)
            text = renderer.text(sample, record.where)
            yield renderer.ids(text, special=isinstance(sample, str) or sample.plain)
        except NoSample as reason:
            yield reason
            continue
        if not isinstance(sample, str) and loses_thoughts(sample, text):
            lost[source.name] += 1


def _joined(tokenizer: Any, path: Path | None, length: int, limit: int, seed: int) -> Tokens:
    """At most ``limit`` full rows: one text file, or the text that every Python carries (``path`` None), its documents
    shuffled and joined with the end-of-text token."""
    documents = list(_python_documents()) if path is None else [path.read_text(encoding="utf-8", errors="replace")]
    stream: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(documents)):
        stream += tokenizer(documents[i], add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= length * limit:
            break
    rows = min(limit, len(stream) // length)
    if not rows:
        raise ReapcError(f"data = {str(path)!r}: {len(stream)} tokens, fewer than one sequence of {length}")
    ids = np.array(stream[: rows * length], np.int32).reshape(rows, length)
    name = "python-docs" if path is None else path.name
    return Tokens(ids, np.ones(ids.shape, bool), np.zeros(rows, np.int32), ("all",), name)


def _python_documents() -> Iterator[str]:
    """Text that every Python carries: its documentation topics and its standard library's source."""
    from pydoc_data import topics

    yield from topics.topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.glob("*.py")):
        yield file.read_text(errors="replace")


def _split_rows(
    tokens: Tokens, data: str, length: int, limit: int, held_out: int, seed: int
) -> tuple[Tokens, Tokens | None]:
    """Rows chosen by ``seed``: ``limit`` to calibrate with, and at most a third of all held out."""
    wanted = limit + held_out
    rows: np.ndarray = np.arange(tokens.sequences)
    if tokens.sequences > wanted:
        rows = np.sort(np.random.default_rng(seed).permutation(tokens.sequences)[:wanted])
    tokens = tokens.take(rows, length)
    if not held_out:
        return tokens, None
    if tokens.sequences < 2:
        raise ReapcError(
            f"calibration.data = {data!r} has one sequence: none is left to verify with",
            hint="give [verify] data, or more calibration text",
        )
    spare = max(1, min(held_out, tokens.sequences // 3))
    order = np.random.default_rng(seed).permutation(tokens.sequences)
    return tokens.take(np.sort(order[spare : spare + limit])), tokens.take(np.sort(order[:spare]))


def _check_vocabulary(split: tuple[Tokens, Tokens | None], folder: Path, vocab_size: int) -> None:
    highest = max(int(tokens.input_ids.max()) for tokens in split if tokens is not None)
    if highest >= vocab_size:
        raise ReapcError(
            f"{folder}: its tokenizer gives token id {highest}, the model's vocabulary has {vocab_size}",
            hint="the tokenizer files belong to another model; copy the right ones",
        )
