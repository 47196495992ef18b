"""What each format for vLLM costs on the demo model: KL to the bf16 original, bytes against predicted bytes, seconds.

    .venv/bin/python benchmarks/quantizers.py [--markdown] [FORMAT ...]

Every row is `reapc quantize` on the whole demo model (nothing pruned, so that the loss is the format's alone) with the
demo's calibration text, then `reapc compare` on its held-out text. Seconds are those of the quantizer on this machine,
and no claim: the ratio to the forward pass over the same text, from the same run, is what can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
# format, options of reapc quantize
ROWS = (
    ("auto-round-w4g32", ("--iters", "50")),
    ("auto-round-w4g32", ("--iters", "0")),
    ("auto-round-w3g32", ("--iters", "50")),
    ("auto-round-w4g32:experts", ("--iters", "0")),
    ("auto-round-w4g32+attention=8+layers.0=8", ("--iters", "0")),
    ("gptq-w4g32", ()),
    ("gptq-w4g32", ("--method", "auto_round", "--iters", "0")),
    ("ct-w4g32", ("--iters", "50")),
    ("ct-w3g32", ("--iters", "0")),
    ("fp8-block", ()),
    ("fp8", ()),
)


def reapc(*arguments: str | Path) -> dict[str, object]:
    command = [sys.executable, "-m", "reapc", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="only these formats")
    wanted = parser.parse_args().formats
    print(f"{os.cpu_count()} cores; {DEMO / 'model'}")
    columns = ("format", "written by", "KL", "top-1", "perplexity", "bytes", "predicted", "expert bits", "starved", "s")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, options in ROWS:
        if wanted and name not in wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="reapc-bench-") as work:
            out = Path(work) / "model"
            made = reapc(
                "quantize", DEMO / "model", "--format", name, "--out", out,
                "--tokens", DEMO / "calibration.safetensors", *options,
            )  # fmt: skip
            lost = reapc("compare", DEMO / "model", out, "--tokens", DEMO / "held_out.safetensors")
        facts = made["quantizer"]
        assert isinstance(facts, dict)
        settings = facts.get("settings", {})
        steps = f", {settings['iters']} steps" if "iters" in settings else ""
        starved = made.get("starved")
        few = f"{starved['count']} of {starved['experts']}" if isinstance(starved, dict) else "-"
        equal = "equal" if made["bytes"] == made["predicted_bytes"] else f"{made['predicted_bytes']:,}"
        print(
            f"| `{name}` | {facts['tool']} ({facts['export']}){steps} | {lost['kl']:.5f} | {100 * lost['top1']:.1f} % "
            f"| {lost['perplexity_a']:.3f} -> {lost['perplexity_b']:.3f} | {made['bytes']:,} | {equal} "
            f"| {made['expert_bits']:.2f} | {few} | {facts['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
