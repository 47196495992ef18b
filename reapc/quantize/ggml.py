"""ggml's own rounding, called in the libggml-base of the cache's llama.cpp (0c1e57098, ggml/include/ggml.h):

    void   ggml_quantize_init(enum ggml_type type);
    bool   ggml_quantize_requires_imatrix(enum ggml_type type);
    size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows,
                               int64_t n_per_row, const float * imatrix);

The last returns the bytes that it wrote. Decoding is gguf-py's.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from reapc.errors import CannotBeDone, ReapcError
from reapc.toolchain import require


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    folder: Path = require("lib_dir")
    path = next((p for p in (folder / "libggml-base.so", folder / "libggml-base.dylib") if p.is_file()), None)
    if path is None:
        raise CannotBeDone(f"{folder}: no libggml-base", hint="build llama.cpp again: reapc doctor --install")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantized(
    rows: NDArray[np.float32], kind: str, weights: NDArray[np.float32] | None = None, threads: int = 1
) -> NDArray[np.uint8]:
    """The blocks of ``rows`` (rows, columns) in the ggml type ``kind``, (rows, bytes of a row).

    ``weights`` (columns,): the importance of each column, as llama-quantize passes an importance matrix. ``threads``
    share the rows, which are rounded each alone. ReapcError where the type needs weights, or its blocks do not divide
    the rows."""
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    source = np.ascontiguousarray(rows, np.float32)
    if source.ndim != 2 or source.shape[1] % block:
        raise ReapcError(f"{kind} has blocks of {block}: rows of {source.shape[-1]} elements do not divide")
    library = _library()
    if weights is None and library.ggml_quantize_requires_imatrix(number):
        raise ReapcError(f"{kind} cannot be written without an importance matrix")
    importance = None if weights is None else np.ascontiguousarray(weights, np.float32)
    if importance is not None and importance.shape != (source.shape[1],):
        raise ReapcError(f"{importance.shape} weights for rows of {source.shape[1]} elements")
    out = np.empty((source.shape[0], source.shape[1] // block * block_bytes), np.uint8)
    library.ggml_quantize_init(number)

    def chunk(start: int, end: int) -> int:
        done: int = library.ggml_quantize_chunk(
            number, source.ctypes.data, out.ctypes.data, start * source.shape[1], end - start, source.shape[1],
            None if importance is None else importance.ctypes.data,
        )  # fmt: skip
        return done

    ends = np.linspace(0, len(source), max(1, min(threads, len(source))) + 1).astype(int).tolist()
    with ThreadPoolExecutor(len(ends) - 1) as pool:
        written = sum(pool.map(chunk, ends, ends[1:]))
    if written != out.nbytes:
        raise CannotBeDone(
            f"ggml wrote {written} bytes of {kind}, {out.nbytes} expected: another version of llama.cpp?"
        )
    return out


def rounded(rows: NDArray[np.float32], kind: str, weights: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """``rows`` as they are read back from ``kind``."""
    number = gguf.GGMLQuantizationType[kind]
    decoded: NDArray[np.float32] = quants.dequantize(quantized(rows, kind, weights), number)
    return decoded
