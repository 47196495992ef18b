"""Runs AutoRound as ``auto_round.py`` asks: ``python -P _auto_round_main.py REQUEST.json``."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Quantizes and saves; the result file names the folder."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"
    os.environ["AR_WORK_SPACE"] = str(Path(request["raw"]).with_name("tmp"))
    if request.get("resume"):
        os.environ["AR_RESUME_DIR"] = request["resume"]

    import torch
    from auto_round import AutoRound
    from auto_round.compressors import orchestrator
    from safetensors.torch import load_file

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    report_layers(orchestrator)
    finished = finished_layers(request.get("resume"))
    tokens = load_file(request["tokens"])
    samples = [
        {"input_ids": ids[None], "attention_mask": mask[None]}
        for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tuner = AutoRound(
        request["source"],
        bits=request["bits"],
        group_size=request["group_size"],
        sym=True,
        iters=request["iters"],
        layer_config=request["layer_config"] or None,
        dataset=samples,
        nsamples=len(samples),
        seqlen=tokens["input_ids"].shape[1],
        batch_size=request["batch_size"],
        seed=request["seed"],
        device_map=device,
        enable_torch_compile=False,  # minutes for the first layer; a tiny model never earns them back
    )
    tuner.quantize_and_save(request["raw"], format=request["export"])
    raw = Path(request["raw"])
    saved = next(folder for folder in (raw, *sorted(raw.iterdir())) if any(folder.glob("*.safetensors")))
    result = {
        "saved": str(saved),
        "device": device,
        "resumed_layers": finished,
        "peak_ram_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(request["result"]).write_text(json.dumps(result))


def finished_layers(resume: str | None) -> int:
    """Layers that an interrupted run left finished."""
    manifests = Path(resume).glob("group_*/resume_manifest.json") if resume else ()
    return sum(len(json.loads(path.read_text())["completed_blocks"]) for path in manifests)


def report_layers(orchestrator: Any) -> None:
    """Has AutoRound's progress bar over the decoder layers print the number that are done."""

    class Bar(orchestrator.tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            print(f"@reapc layer {int(self.n)}", flush=True)
            return shown

    orchestrator.tqdm = Bar


if __name__ == "__main__":
    main()
