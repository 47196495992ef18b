"""vLLM's own argument parser, 0.32 and 0.33, on every launch line that reapc emits (`make vllm-env`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from specs import recipe_of

from reapc.arch import known
from reapc.arch.config import FAMILIES
from reapc.engines import vllm_launch
from reapc.engines.artifact import Artifact, entries
from reapc.errors import CannotBeDone
from reapc.plan import Plan
from reapc.planner.search import make_plan
from reapc.recipe import Recipe, load_recipe

pytestmark = pytest.mark.vllm

# Every mark that a parser may ask of a chat template: so each family's parser is emitted.
TEMPLATE = Artifact(template=" ".join(e.get(k, "") for e in entries() for k in ("tool_mark", "reasoning_mark")))
HOSTILE = ("it's", "$(touch pwned)", "`id`", "a\nb", "--model", "-x", "a b", 'q"q', "späße/模型", "a;b&c|d", "x" * 200)
# Stands for vLLM in the script: writes its own arguments down.
DUMP = "#!{python}\nimport json, sys\njson.dump(sys.argv[1:], open({file!r}, 'w'))\n"


def environment(name: str) -> Path:
    found = subprocess.run(
        [sys.executable, ROOT / "tools" / "vllm_env.py", "--path", name], capture_output=True, text=True, check=False
    )
    if found.returncode:
        missing = pytest.fail if os.environ.get("REAPC_REQUIRE_VLLM") else pytest.skip
        missing(found.stderr.strip())
    return Path(found.stdout.strip())


def parse(name: str, lines: list[list[str]]) -> list[dict[str, Any]]:
    """What that vLLM makes of these argument vectors."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    done = subprocess.run(
        [environment(name) / "bin" / "python", ROOT / "tests" / "vllm_parse.py"],
        input=json.dumps(lines), capture_output=True, text=True, check=False,
        env={**variables, "VLLM_TARGET_DEVICE": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def argv_of(plan: Plan, recipe: Recipe, folder: Path, artifact: Artifact, **variables: str) -> list[str]:
    """The argument vector that serve.sh really runs vLLM with."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    written, stand_in = folder / "argv.json", folder / "vllm"
    written.unlink(missing_ok=True)
    stand_in.write_text(DUMP.format(python=sys.executable, file=str(written)))
    stand_in.chmod(0o755)
    (folder / "serve.sh").write_text(vllm_launch.serve_script(plan, "model", recipe, artifact))
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(
        ["bash", folder / "serve.sh"], capture_output=True, text=True, check=False,
        env={**clean, "VLLM": str(stand_in), "REAPC_SKIP_MEMORY_CHECK": "1", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(written.read_text())
    return found


@lru_cache(maxsize=1)
def one_of_each_family() -> dict[str, str]:
    """model_type -> a model of the catalogue."""
    return {known.spec(name).model_type: name for name in reversed(known.names())}


def plan_of(name: str, **serve: Any) -> tuple[Plan, Recipe]:
    """A plan for vLLM on the smallest of these targets that takes the model."""
    spec = known.spec(name)
    for target in ("h100x8", "h200x8", "b200x8", "b300x8"):
        recipe = recipe_of(target, serve={"engine": "vllm", "context": min(4096, spec.max_context), **serve})
        try:
            return make_plan(recipe, spec, name), recipe
        except CannotBeDone:
            continue
    pytest.fail(f"{name}: no target of the list takes it")


@pytest.mark.parametrize("version", ["serve", "parser"])
def test_every_line(version: str, tmp_path: Path) -> None:
    environment(version)
    lines: list[list[str]] = []
    wanted: list[dict[str, Any]] = []

    def add(plan: Plan, recipe: Recipe, artifact: Artifact, expected: dict[str, Any], **variables: str) -> None:
        lines.append(argv_of(plan, recipe, tmp_path / str(len(lines)), artifact, **variables))
        place = plan.chosen.placement
        wanted.append(
            {
                "tensor_parallel_size": place.tensor_parallel,
                "pipeline_parallel_size": place.pipeline_parallel,
                "enable_expert_parallel": place.expert_parallel > 1,
                "max_model_len": plan.chosen.context,
                "max_num_seqs": plan.chosen.concurrency,
                "host": recipe.serve.host,
                "trust_remote_code": False,
                **expected,
            }
        )

    recipes = 0
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        recipe = load_recipe(path)
        spec = known.spec(recipe.model.source) if not recipe.model.source.startswith(".") else None
        if spec is None:
            from reapc.arch import load_config, model_spec

            spec = model_spec(load_config(recipe.path(recipe.model.source)))
        plan = make_plan(recipe, spec, recipe.model.source)
        if plan.chosen.engine == "vllm":
            recipes += 1
            add(plan, recipe, Artifact(spec.model_type, TEMPLATE.template), {})
    assert recipes >= 5
    for model_type, name in one_of_each_family().items():
        plan, recipe = plan_of(name)
        artifact = Artifact(model_type, TEMPLATE.template)
        parsers = vllm_launch.choose_parsers(artifact, name.rsplit("/", 1)[-1])
        known_parsers = {"tool_call_parser": parsers.tool or None, "enable_auto_tool_choice": bool(parsers.tool)}
        add(plan, recipe, artifact, known_parsers)
        if (
            known.spec(name).family in vllm_launch.vllm_rules.DATA["speculative"]["families"]
            and known.spec(name).mtp_layers
        ):
            drafted, asked = plan_of(name, speculative="mtp")
            add(drafted, asked, artifact, {})
            assert "--speculative-config" in lines[-1]
    # the others are spelled differently only (minimax_m3_vl), or have no model in the catalogue (qwen2_moe)
    assert set(FAMILIES) - set(one_of_each_family()) == {"qwen2_moe", "minimax_m3_vl"}
    plan, recipe = plan_of("Qwen/Qwen3-30B-A3B")
    for name in HOSTILE:
        add(plan.model_copy(update={"model": name}), recipe, Artifact("qwen3_moe", TEMPLATE.template), {})
    assert not list(tmp_path.rglob("pwned"))
    open_host = recipe_of("h100x8", serve={"engine": "vllm", "host": "0.0.0.0"})
    add(plan, open_host, Artifact(), {"api_key": None}, VLLM_API_KEY="secret")
    assert "secret" not in lines[-1]
    # a cluster: rank 0 answers, rank 1 has no API
    cluster = recipe_of(
        {"base": "h100x8", "gpus": 16, "nodes": 2}, serve={"engine": "vllm", "tensor_parallel": 8, "context": 4096}
    )
    spread = make_plan(cluster, known.spec("deepseek-ai/DeepSeek-V3"), "deepseek-ai/DeepSeek-V3")
    assert (spread.chosen.placement.tensor_parallel, spread.chosen.placement.pipeline_parallel) == (8, 2)
    for rank in (0, 1):
        expected = {"nnodes": 2, "node_rank": rank, "headless": rank > 0, "master_addr": "10.0.0.1"}
        add(spread, cluster, Artifact(), expected, NODE_RANK=str(rank), MASTER_ADDR="10.0.0.1")

    wrong = [
        ["serve", "m", "--swap-space", "4"],
        ["serve", "m", "--use-v2-block-manager"],
        ["serve", "m", "--enable-auto-tool-choice", "--tool-call-parser", "no_such_parser"],
        ["serve", "m", "--max-num-seqs", "many"],
    ]
    found = parse(version, [*lines, *wrong])
    for argv, expected, values in zip(lines, wanted, found, strict=False):
        assert "error" not in values, (argv, values)
        assert {key: values[key] for key in expected} == expected, argv
    for argv, values in zip(wrong, found[len(lines) :], strict=True):
        assert "error" in values, argv
