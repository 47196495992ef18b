"""Logits of a GGUF model through llama.cpp's C interface: the child process of ``gguf_logits``.

A script, run with ``python -P``: ``_gguf_worker.py BINDINGS MODEL IDS.npy LENGTHS.npy THREADS KV``, where KV is the
number of the KV cache's ggml type. Writes to stdout the vocabulary size (int64), then float32 log-probabilities of each
sequence's tokens, row by row.
"""

import importlib
import os
import sys
import types
from typing import Any, BinaryIO

import numpy as np

CHUNK_TOKENS = 256
F16 = 1  # its number as a ggml type


def load_bindings(folder: str) -> Any:
    """The low-level module alone: the package's ``__init__`` would import the server's dependencies."""
    package = types.ModuleType("llama_cpp")
    package.__path__ = [os.path.join(folder, "llama_cpp")]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise, the sum in float64."""
    shifted: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def stream(
    lib: Any, model_path: str, ids: np.ndarray, lengths: np.ndarray, threads: int, kv: int, out: BinaryIO
) -> None:
    """Decodes every sequence with an empty KV cache and writes its rows."""
    lib.llama_backend_init()
    model_parameters = lib.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(model_path.encode(), model_parameters)
    if not model:
        raise SystemExit(f"llama.cpp could not load {model_path}")
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    out.write(np.int64(vocab).tobytes())
    out.flush()
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        raise SystemExit(f"token ids reach {ids.min()}..{ids.max()}, the model has a vocabulary of {vocab}")
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = max(ids.shape[1], 1)
    parameters.n_batch = parameters.n_ubatch = CHUNK_TOKENS
    parameters.n_threads = parameters.n_threads_batch = threads
    if kv != F16:
        parameters.type_k = parameters.type_v = kv
        parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED  # quantized values demand it
    context = lib.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp could not make a context of {ids.shape[1]} tokens")
    batch = lib.llama_batch_init(CHUNK_TOKENS, 0, 1)
    for sequence, length in zip(ids, lengths, strict=True):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for start in range(0, int(length), CHUNK_TOKENS):
            tokens = sequence[start : min(start + CHUNK_TOKENS, int(length))]
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = int(token), start + index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if code := lib.llama_decode(context, batch):
                raise SystemExit(f"llama_decode returned {code} at position {start}")
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(len(tokens), vocab))
            out.write(log_softmax(logits).tobytes())
        out.flush()


def main() -> None:
    """Keeps stdout for the numbers: whatever a library prints goes to stderr."""
    bindings, model, ids, lengths, threads, kv = sys.argv[1:]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with out:
        stream(load_bindings(bindings), model, np.load(ids), np.load(lengths), int(threads), int(kv), out)


if __name__ == "__main__":
    main()
