"""The whole check of a running server: whose model it serves, what it lost, how it answers, how fast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from reapc.errors import CannotBeDone
from reapc.progress import Progress
from reapc.serving.built import Built
from reapc.serving.client import LLAMA_PYTHON, LLAMA_SERVER, UNKNOWN, Client
from reapc.serving.fidelity import Reference, measure_server, read_built_reference
from reapc.serving.load import prompts_of, read_prompts, run_load

UNRELATED_TOP1 = 0.02  # what another tokenizer gives; a badly hurt model still agrees more often
UNRELATED_KL = 0.8  # of the KL against a guess at random
LLAMA_POSITIONS = 32  # of a sequence; each is a request of its own there


def check_server(
    built: Built,
    url: str,
    key_variable: str,
    model: str | None,
    progress: Progress,
    *,
    sequences: int = 16,
    positions: int | None = None,
    top: int | None = None,
    concurrency: int = 1,
    prompts: Path | None = None,
    max_tokens: int = 128,
) -> dict[str, Any]:
    """The report as JSON data: ``server``, ``fidelity`` (see ``Sums.to_json``), ``load`` (see ``Load.to_json``),
    ``stored`` (what the build measured) and ``remarks``."""
    chosen_prompts = read_prompts(prompts) if prompts else None
    with Client(url, key_variable, model) as client:
        info = client.connect()
        if info.kind == LLAMA_PYTHON:
            raise CannotBeDone(
                f"{client.url}: llama_cpp.server takes prompts as text and gives log-probabilities by text, "
                "so nothing can be compared token by token",
                hint="serve the same GGUF with llama-server: reapc doctor --install",
            )
        reference = read_built_reference(built, sequences)
        remarks = _whose(built, client, reference)
        wanted = positions if positions is not None else (LLAMA_POSITIONS if info.kind == LLAMA_SERVER else 0)
        fidelity = measure_server(client, reference, progress, positions=wanted, top=top, concurrency=concurrency)
        remarks += fidelity.remarks
        figures = fidelity.to_json()
        if figures["top1"] < UNRELATED_TOP1 or figures["kl"] > UNRELATED_KL * math.log(reference.vocab):
            remarks.append(
                "the server's predictions have nothing in common with the original's: another model or tokenizer"
            )
        load = run_load(
            client, chosen_prompts or prompts_of(reference.tokens, info.context), max_tokens, concurrency, progress
        )
    stored = built.manifest.get("fidelity")
    return {
        "server": {
            "url": client.url,
            "engine": client.describe(),
            "kind": info.kind,
            "model": info.model,
            "context": info.context,
        },
        "remarks": remarks,
        "fidelity": figures,
        "load": load.to_json(),
        "stored": {"kl": stored["kl"], "top1": stored["top1"]} if isinstance(stored, dict) else None,
    }


def _whose(built: Built, client: Client, reference: Reference) -> list[str]:
    """Signs that the server does not serve this build; a vocabulary of another size ends the check."""
    info = client.info
    if info.vocab is not None and info.vocab != reference.vocab:
        raise CannotBeDone(
            f"{client.url}: serves {info.model!r} with a vocabulary of {info.vocab} tokens; the model in "
            f"{built.folder} has {reference.vocab}: another model, nothing can be compared",
            hint="give the build folder that the server was started from, or the address of its server",
        )
    remarks = []
    if info.kind == UNKNOWN:
        remarks.append("reapc does not know this engine; it is asked the way vLLM is")
    if info.others and not client.named:
        remarks.append(f"the server has other models too: {', '.join(info.others)} (--model NAME)")
    if info.tensor_bytes is not None and built.tensor_bytes not in (None, info.tensor_bytes):
        remarks.append(
            f"not the file of this build: the server's tensors are {info.tensor_bytes:,} bytes, the build's "
            f"{built.tensor_bytes:,}"
        )
    elif info.path and info.tensor_bytes is None and not _same(Path(info.path), built.artifact):
        remarks.append(f"perhaps not the folder of this build: the server serves {info.path}")
    if (planned := built.plan.chosen.context) and info.context and info.context < planned:
        remarks.append(f"the server's context is {info.context} tokens, the plan's {planned}")
    return remarks


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file on this machine; a path of another machine is taken for another."""
    try:
        return a.samefile(b)
    except OSError:
        return False
