"""llm-compressor in its own environment (tools/llmcompressor_env.py makes it where it lacks), one job a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reapc.errors import CannotBeDone

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "0.13.0"


def done_by(contender: str, model: Path, tokens: Path, release: str, **job: Any) -> dict[str, Any]:
    """What a contender of contenders.py found of ``model`` on the file ``tokens``. CannotBeDone with the end of what it
    said where it fails."""
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "llmcompressor_env.py", release],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if made.returncode:  # it has said why
        raise CannotBeDone(f"there is no environment for llm-compressor {release}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        whole = {
            "contender": contender, "release": release, "folder": str(model.absolute()),
            "tokens": str(tokens.absolute()),
            "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1), "work": str(work / "work"),
            "result": str(work / "result.json"), **job,
        }  # fmt: skip
        (work / "job.json").write_text(json.dumps(whole))
        # what leads to reapc's packages stays out of the other environment
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [made.stdout.strip(), ROOT / "benchmarks" / "contenders.py", work / "job.json"], cwd=work, text=True,
            capture_output=True, env={**environment, "HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip
        if done.returncode:
            said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-25:])
            raise CannotBeDone(f"llm-compressor {release} failed on {model} (exit {done.returncode}):\n{said}")
        found: dict[str, Any] = json.loads((work / "result.json").read_text())
        return found
