"""Runs GPTQModel as ``gptq.py`` asks: ``python -P _gptq_main.py REQUEST.json``."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Quantizes and saves; the result file lists the linears that were only rounded."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    # 7.6 asks its pool for two workers whatever the machine has, and fails where it has fewer
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, request["threads"] or os.cpu_count() or 1))

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import ExpertsRoutingBypass, Fallback, MoEConfig
    from safetensors.torch import load_file

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        dynamic=request["dynamic"],
        sym=True,
        desc_act=False,
        damp_percent=request["damp_percent"],
        act_group_aware=request["act_group_aware"],
        fallback=Fallback(threshold=f"{100 * request['fallback_share']}%"),
        moe=MoEConfig(routing=ExpertsRoutingBypass()) if request["all_experts"] else None,
    )
    model = GPTQModel.load(request["source"], config, device=device)
    # Definitions name every layer's modules; a layer without experts lacks some. What is left unquantized for that is
    # found when the result is published.
    model.layer_modules_strict = False
    model.layer_callback = report
    tokens = load_file(request["tokens"])
    masks = tokens["attention_mask"].bool()
    samples = [
        {"input_ids": ids[mask][None], "attention_mask": mask[mask][None].long()}
        for ids, mask in zip(tokens["input_ids"], masks, strict=True)
        if mask.any()
    ]
    # 7.6 pads a batch to one length and leaves padding out of attention's statistics, but not out of the experts'
    rows = request["batch_size"] if masks.all() else 1
    log = model.quantize(samples, batch_size=rows, calibration_data_min_length=1)
    model.save(request["raw"])
    result = {
        "device": device,
        "fallback": fallback(log),
        "peak_ram_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(request["result"]).write_text(json.dumps(result))


def report(layer_idx: int, submodule_finalized: bool) -> None:
    """GPTQModel calls it twice a layer: when it was run, and when its linears are packed."""
    if submodule_finalized:
        print(f"\n@reapc layer {layer_idx + 1}", flush=True)


def fallback(log: Any) -> list[str]:
    """``LAYER.MODULE`` of every linear whose log has no loss of GPTQ but words: "rtn fallback: 0.0123"."""
    rows = [row for group in log.values() for row in group] if isinstance(log, dict) else log
    return [f"{row['layer']}.{row['module']}" for row in rows if "fallback" in str(row["loss"])]


if __name__ == "__main__":
    main()
