"""The launch script of vLLM: exactly the layout, context and memory that the plan counted (``vllm.py``).

Every argument is one that the parsers of vLLM 0.32 and 0.33 take (tests/test_vllm_parser.py runs them).
"""

from __future__ import annotations

from typing import Any

from reapc.engines import vllm, vllm_rules
from reapc.engines.artifact import Artifact, choose_parsers
from reapc.engines.render import render, server_name
from reapc.formats import weights
from reapc.plan import Plan
from reapc.recipe import Recipe
from reapc.target import Target

MASTER_PORT = 29501  # vLLM's default for --master-port
RAY_PORT = 6379  # Ray's


def _geforce(target: Target) -> bool:
    """GeForce cards, whose custom all-reduce over PCIe is unreliable; told by the name where a recipe wrote it."""
    return target.geforce or ("RTX" in target.card and "PRO" not in target.card and "Ada" not in target.card)


def dtype(fmt: str, target: Target) -> str:
    """--dtype: bfloat16, which every method that reapc writes computes in (their get_supported_act_dtypes), except for
    fp16 checkpoints and for cards before 8.0, which have no bfloat16."""
    parsed = weights.parse(fmt)
    old = target.capability is not None and target.capability < (8, 0)
    return "float16" if old or (parsed is not None and parsed.name == "fp16") else "bfloat16"


def serve_script(plan: Plan, model_path_relative: str, recipe: Recipe, artifact: Artifact | None = None) -> str:
    """The text of serve.sh. Without an ``artifact`` no parsers are emitted."""
    chosen, target, serve = plan.chosen, recipe.target, recipe.serve
    place = chosen.placement
    tp, pp = place.tensor_parallel, place.pipeline_parallel
    nodes = vllm_rules.nodes_used(target, tp, pp)
    assert nodes is not None, "the planner chose a layout that crosses machines"
    partition = list(place.layers_per_device)
    name = plan.model.rstrip("/").rsplit("/", 1)[-1]
    parsers = choose_parsers(artifact or Artifact(), name, serve.tool_parser, serve.reasoning_parser)
    local = tp * pp // nodes
    values: dict[str, Any] = {
        "gpus": local,
        # vLLM refuses to start unless its whole share of a card is free
        "needs": [-(-int(target.total_bytes * vllm.utilization(target)) // vllm.MIB)] * local,
        "tp": tp,
        "pp": pp,
        "ep": place.expert_parallel > 1,
        "nodes": nodes,
        "master_port": MASTER_PORT,
        "ray_port": RAY_PORT,
        "partition": ",".join(map(str, partition)) if partition != vllm.stage_layers(sum(partition), pp) else "",
        "context": chosen.context,
        "sequences": chosen.concurrency,
        "kv": chosen.kv_dtype,
        "dtype": dtype(chosen.format, target),
        "utilization": vllm.utilization(target),
        "batched": vllm.MAX_BATCHED_TOKENS,
        "no_custom_all_reduce": _geforce(target) and tp * pp > 1,
        "tool": parsers.tool,
        "reasoning": parsers.reasoning,
        "arguments": parsers.arguments,
        "draft_tokens": vllm_rules.draft_tokens(plan.family) if serve.speculative == "mtp" else 0,
    }
    return render("vllm.sh.j2", plan, model_path_relative, recipe, values)


def client_script(plan: Plan, recipe: Recipe) -> str:
    """The text of client.py, for either engine."""
    key = "VLLM_API_KEY" if plan.chosen.engine == "vllm" else "LLAMA_API_KEY"
    return render("client.py.j2", plan, server_name(plan), recipe, {"key": key})
