"""GGUF out of a checkpoint: llama.cpp's converter and quantizer, and its importance matrix file."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import gguf
import numpy as np

from reapc.arch import load_config, model_spec
from reapc.checkpoint.atomic import atomic_path
from reapc.checkpoint.reader import listed
from reapc.errors import CannotBeDone, ReapcError
from reapc.toolchain import require, run_logged

Log = Callable[[str], None]

_UNKNOWN_HASH = re.compile(r"chkhsh:\s*([0-9a-f]{64})")
_TENSOR_LINE = re.compile(
    r"^\[\s*\d+/\s*\d+\]\s+\S+\s+-\s+\[([\d, ]+)\], type =\s*(\w+),\s+size =.*?MiB(?: ->\s*[\d.]+ MiB \((\w+)\))?"
)
_STEP = re.compile(r"^(\[\s*\d+/\s*\d+\])\s+(\S+)")


def _quiet(line: str) -> None:
    """Drops the line."""


def lacks_mtp(checkpoint: Path) -> bool:
    """Whether the converter must be told that there are no MTP layers: Qwen's from 3-Next on counts some by itself
    where config.json says none, and stops (conversion/qwen.py)."""
    spec = model_spec(load_config(checkpoint))
    return spec.family in ("qwen3_next", "qwen3_5_moe") and not spec.mtp_layers


def convert(
    checkpoint: Path, out: Path, outtype: str = "bf16", pre_tokenizer: str | None = None, log: Log = _quiet
) -> None:
    """Writes ``checkpoint`` (a Hugging Face folder) to ``out`` as GGUF of ``outtype`` (f32, f16, bf16, q8_0).

    A tokenizer whose hash llama.cpp does not know is an error that asks for ``pre_tokenizer``.
    """
    converter = require("convert")
    unknown_hashes: list[str] = []

    def note_hash(line: str) -> None:
        if match := _UNKNOWN_HASH.search(line):
            unknown_hashes.append(match.group(1))

    script = Path(__file__).with_name("_convert_main.py")
    with atomic_path(out.absolute()) as partial:
        command: list[str | Path] = [sys.executable, "-P", script, converter, pre_tokenizer or ""]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        try:
            command += [checkpoint.absolute(), "--outfile", partial, "--outtype", outtype]
            if lacks_mtp(checkpoint):
                command.append("--no-mtp")
            run_logged(command, "the GGUF conversion", log, env=env, progress=note_hash)
        except CannotBeDone as error:
            if not unknown_hashes:
                raise
            raise ReapcError(
                f"{checkpoint}: llama.cpp does not know this tokenizer's pre-tokenizer (hash {unknown_hashes[0]})",
                hint='name the rule that splits text in the recipe, e.g. quantize.pre_tokenizer = "qwen2"',
            ) from error
        _sync(partial)


def quantize(
    source: Path,
    out: Path,
    ftype: str,
    imatrix: Path | None = None,
    threads: int = 0,
    log: Log = _quiet,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantizes a GGUF to ``ftype`` (llama.cpp's name, e.g. Q4_K_M); ``threads`` 0 takes every core.

    ``types``: ggml types by the tensors' full names, for those tensors in the place of what the rules of ``ftype``
    give; CannotBeDone where a tensor did not become what was asked for."""

    def step(line: str) -> str | None:
        match = _STEP.match(line)
        return f"quantizing {match.group(1)} {match.group(2)}" if match else None

    with atomic_path(out.absolute()) as partial, tempfile.TemporaryDirectory(prefix="reapc-types-") as folder:
        options, cwd = _imatrix_options(imatrix)
        if types:
            patterns = Path(folder) / "types.txt"
            patterns.write_text(type_patterns(types))
            options += ["--tensor-type-file", patterns]
        command = [require("quantize"), *options, source.absolute(), partial, ftype]
        run_logged(
            [*command, str(threads or os.cpu_count() or 1)], f"llama-quantize to {ftype}", log, cwd=cwd, progress=step
        )
        if types:
            check_types(partial, types, out)
        _sync(partial)


def type_patterns(types: Mapping[str, str]) -> str:
    """The lines of a ``--tensor-type-file``. Its names are regular expressions that are searched for in the tensors'
    names (tools/quantize/quantize.cpp, std::regex), so each is escaped and anchored at both ends."""
    lines = []
    for name, kind in types.items():
        if re.search(r"[\s=]", name) or name != name.lower():
            raise ReapcError(f"tensor {name!r}: llama-quantize's list takes names without spaces, = and capitals")
        lines.append(f"^{re.escape(name)}$={kind.lower()}\n")
    return "".join(lines)


def check_types(path: Path, types: Mapping[str, str], name: Path | None = None) -> None:
    """CannotBeDone, with the first few names, unless the tensors of the GGUF at ``path`` have these types."""
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(path)).tensors}
    wrong = [f"{n} is {found.get(n, 'not there')}, {k} was asked for" for n, k in types.items() if found.get(n) != k]
    if wrong:
        raise CannotBeDone(
            f"{name or path}: {len(wrong)} tensors are not as allocated: {listed(wrong)}",
            hint="was the allocation made for this model, and with this llama.cpp? `reapc doctor` shows its version",
        )


def dry_run_bytes(source: Path, ftype: str, imatrix: Path | None = None) -> int | None:
    """Bytes of tensor data that quantizing would give, without the file's header; None if unreadable.

    llama-quantize prints sizes in MiB with two decimals: they are computed here, exactly, from the shape
    and the type that it prints for every tensor.
    """
    options, cwd = _imatrix_options(imatrix)
    command = [require("quantize"), "--dry-run", *options, source.absolute(), ftype]
    output = run_logged(command, f"llama-quantize --dry-run to {ftype}", _quiet, cwd=cwd, keep_lines=1_000_000)
    total_bytes = tensors = 0
    for line in output.splitlines():
        if not (match := _TENSOR_LINE.match(line)):
            continue
        shape = [int(part) for part in match.group(1).split(",")]
        name = (match.group(3) or match.group(2)).upper()
        if name not in gguf.GGMLQuantizationType.__members__:
            return None
        block_weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        total_bytes += prod(shape) // block_weights * block_bytes
        tensors += 1
    announced = sum(1 for line in output.splitlines() if _STEP.match(line))
    return total_bytes if tensors and tensors == announced else None


def _imatrix_options(imatrix: Path | None) -> tuple[list[str | Path], Path | None]:
    """Options and working folder: the quantizer stores the name as given, so no local path goes into the file."""
    if imatrix is None:
        return [], None
    return ["--imatrix", imatrix.name], imatrix.absolute().parent


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _ImatrixWriter(gguf.GGUFWriter):
    """A GGUF writer that stores no ``general.architecture``: llama-imatrix writes none."""

    def add_architecture(self) -> None:
        """Stores nothing."""


def write_imatrix(
    out: Path,
    entries: Mapping[str, tuple[np.ndarray, np.ndarray]],
    chunk_count: int,
    chunk_size: int,
    datasets: list[str],
) -> None:
    """Writes llama.cpp's importance matrix; ``entries`` maps GGUF tensor names to (in_sum2, counts).

    in_sum2 is the sum over tokens of the squared inputs, (n_in,) or (n_expert, n_in); counts the number of
    tokens, one or (n_expert,). An expert without tokens is stored as zeros, as llama-imatrix does: the
    quantizer weighs its inputs equally. ``chunk_size`` is in tokens; ``datasets`` names the corpora.
    """
    if not entries or not datasets:
        raise ReapcError("an importance matrix needs at least one tensor and the name of its corpus")
    with atomic_path(out.absolute()) as partial:
        writer = _ImatrixWriter(partial, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", datasets)
        writer.add_uint32("imatrix.chunk_count", chunk_count)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name in sorted(entries):
            in_sum2, counts = (np.asarray(part) for part in entries[name])
            rows = np.atleast_2d(in_sum2).astype(np.float32)
            column = counts.reshape(-1, 1).astype(np.float32)
            if len(rows) != len(column):
                raise ReapcError(f"{name}: {len(rows)} rows of squared inputs, but {len(column)} counts")
            if not (np.isfinite(rows).all() and np.isfinite(column).all()):
                raise ReapcError(f"{name}: the squared inputs or counts are not finite", exit_code=1)
            writer.add_tensor(f"{name}.in_sum2", rows)
            writer.add_tensor(f"{name}.counts", column)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _sync(partial)
