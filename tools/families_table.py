"""Writes docs/families.md: every family on a tiny model of it, through inspect, observe, prune, reload and conversion,
and, where `make vllm-env` was run, through vLLM's own loader.

    .venv/bin/python tools/families_table.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import family_checks as checks  # noqa: E402
from family_models import CONFIGS, NAMES  # noqa: E402

from reapc.arch import known, model_spec  # noqa: E402
from reapc.checkpoint.reader import Checkpoint  # noqa: E402
from reapc.engines import vllm_rules  # noqa: E402

HEAD = """# Families

Each row is a tiny random model of the real class with the real flags, written as published ones look, and what came of
it (`tools/families_table.py` writes this page; `tests/test_families.py` asserts it):

- **inspect**: names and shapes of all tensors follow from config.json alone.
- **observe**: the streamed pass gives transformers' log-probabilities to 1e-4 (fp32; a padded sequence among them).
- **gate weight**: the sum of recorded weight x expert output is what the experts add to their block's output. Llama-4
  multiplies an expert's input instead: there the weight recorded is 1, the norm that of what leaves the expert.
- **prune**, **reload**: fewer experts; transformers loads the result with no missing, unexpected or misshapen key, and
  computes what is streamed of it.
- **GGUF**: llama.cpp's converter writes of the pruned model just the tensors that the planner counts, or its own words.
- **vLLM**: vLLM 0.33's model class loads every tensor of the pruned model for a card that is only told to it (compute
  capability 9.0), or what stopped it here: kernels that such a small model or a machine without a GPU cannot have say
  nothing about the real one. Refusals of the planner come first.

transformers 5.23 has no Kimi-K3: it is planned, pruned, and refused by name for the rest. Gemma-4 models whose layers
share keys and values, or have embeddings of their own, are refused by name. DeepSeek-V4's first layers choose by a
table of token ids: it is remapped to the experts that stay (see `reapc/arch/deepseek_v4.py`); vLLM's router kernel
takes the published expert counts only.

"""


def vllm_says(folders: dict[str, Path]) -> dict[str, str]:
    """What vLLM's loader makes of each, or "not asked" without its environment."""
    import subprocess

    command = [sys.executable, ROOT / "tools" / "vllm_env.py", "--path", "parser"]
    asked = subprocess.run(command, capture_output=True, check=False)
    if asked.returncode:
        return dict.fromkeys(folders, "not asked")
    from test_vllm_kernels import ask

    cases = [{"folder": str(folder), "load": True} for folder in folders.values()]
    found = {}
    for name, answer in zip(folders, ask("9.0", 1, cases), strict=True):
        if "error" in answer:
            found[name] = f"not shown here ({short(answer['error'])})"
        else:
            found[name] = "yes" if not answer["unloaded"] else f"not filled: {', '.join(answer['unloaded'][:2])}"
    for name in folders:
        if reason := vllm_rules.fixed_experts(model_spec(CONFIGS[name])):
            found[name] = f"no: {reason}"
    return found


def short(text: str) -> str:
    words = " ".join(text.replace("|", "/").split())
    return words if len(words) <= 90 else words[:87] + "..."


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    rows: dict[str, dict[str, str]] = {}
    pruned: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="reapc-families-") as scratch:
        root = Path(scratch)
        for name in NAMES:
            folder, model = checks.prepared(name, root)
            work = root / f"{folder.name}-work"
            work.mkdir()
            result = checks.observe_and_prune(folder, work)
            seen: dict[str, Any] = {
                "inspect": checks.same_names(Checkpoint(folder)),
                "observe": checks.streams_alike(folder, model),
                "gate weight": checks.weighs_alike(name, folder, model),
                "prune": checks.same_names(Checkpoint(result.folder)),
                "reload": checks.reloads(result),
            }
            rows[name] = {key: "yes" if value else "no" for key, value in seen.items()}
            pruned[name] = result.folder
            print(name, rows[name], flush=True)
        said = vllm_says(pruned)
        for name, text in checks.converter_says(pruned).items():
            rows[name]["GGUF"] = short(text)
            rows[name]["vLLM"] = said[name]
    columns = (*checks.COLUMNS, "vLLM")
    lines = [f"| model | family | for example | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for name, row in rows.items():
        family = model_spec(CONFIGS[name]).family
        kind = CONFIGS[name]["model_type"]
        examples = [model for model in known.names() if known.spec(model).model_type == kind]
        lines.append(
            f"| `{name}` | {family} | {', '.join(examples[:2]) or '(not in the catalogue)'} | "
            + " | ".join(row[column] for column in columns)
            + " |"
        )
    (ROOT / "docs" / "families.md").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
