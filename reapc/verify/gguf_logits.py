"""Log-probabilities of a GGUF model, computed by the pinned llama.cpp in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from reapc.engines.llamacpp_memory import KV_TYPES
from reapc.errors import CannotBeDone, ReapcError
from reapc.toolchain import find_llamacpp, require


def gguf_log_probs(
    gguf: Path,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    threads: int = 0,
    vocab_size: int | None = None,
    kv: str = "f16",
) -> Iterator[np.ndarray]:
    """Yields, per sequence of ``input_ids`` (n, length), log-softmax at each position: (length, vocab) float32.

    ``attention_mask`` (1 = token) may mask the end of a sequence only; rows there are NaN. Every sequence
    starts from an empty KV cache of the type ``kv``. ``threads`` 0 takes every core. ``vocab_size``, where given, must
    be the file's. The numbers arrive through a pipe, a sequence at a time: nothing is written to disk.
    """
    require("lib_dir")
    if not gguf.is_file():
        raise ReapcError(f"{gguf}: no such file")
    ids = np.ascontiguousarray(input_ids, dtype=np.int32)
    lengths = _lengths(ids, attention_mask)
    return _stream(gguf, ids, lengths, threads or os.cpu_count() or 1, vocab_size, KV_TYPES[kv]["ggml"])


def _lengths(ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
    """Tokens of each sequence before its padding."""
    if attention_mask is None:
        return np.full(len(ids), ids.shape[1], dtype=np.int32)
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != ids.shape or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ReapcError("attention_mask must have the shape of input_ids and mask the end of sequences only")
    lengths: np.ndarray = mask.sum(axis=1).astype(np.int32)
    return lengths


def _stream(
    gguf: Path, ids: np.ndarray, lengths: np.ndarray, threads: int, vocab_size: int | None, kv: int
) -> Iterator[np.ndarray]:
    tools = find_llamacpp()
    script = Path(__file__).with_name("_gguf_worker.py")
    with tempfile.TemporaryDirectory(prefix="reapc-") as folder, tempfile.TemporaryFile("w+b") as errors:
        np.save(Path(folder) / "ids.npy", ids)
        np.save(Path(folder) / "lengths.npy", lengths)
        files = [gguf.absolute(), Path(folder) / "ids.npy", Path(folder) / "lengths.npy"]
        command = [sys.executable, "-P", script, tools.bindings, *files, threads, kv]
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(tools.lib_dir)},
        )
        assert process.stdout is not None
        with process:
            try:
                vocab = int(_read(process, process.stdout, errors, np.empty(1, dtype=np.int64))[0])
                if vocab_size is not None and vocab != vocab_size:
                    raise ReapcError(f"{gguf}: a vocabulary of {vocab}, expected {vocab_size}", exit_code=1)
                for length in lengths:
                    rows = np.full((ids.shape[1], vocab), np.nan, dtype=np.float32)
                    _read(process, process.stdout, errors, rows[:length])
                    yield rows
            finally:
                process.kill()


def _read(process: subprocess.Popen[bytes], pipe: IO[bytes], errors: IO[bytes], into: np.ndarray) -> np.ndarray:
    """Fills ``into``; a worker that ends before is an error with the last lines that it wrote."""
    view = memoryview(into.data).cast("B") if into.size else memoryview(b"")
    done = 0
    while done < len(view):
        count = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            code = process.wait()
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-15:]
            lines = "\n    ".join(last)
            raise CannotBeDone(f"llama.cpp ended early (exit {code}); its last lines:\n    {lines}")
        done += count
    return into
