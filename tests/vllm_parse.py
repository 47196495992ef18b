"""Run inside one of vLLM's environments: parses launch lines as `vllm serve` does.

Reads a JSON list of argument vectors, prints for each {"error": ...} or the values that came out.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

KEPT = (
    "model_tag", "served_model_name", "host", "port", "tensor_parallel_size", "pipeline_parallel_size",
    "enable_expert_parallel", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
    "kv_cache_dtype", "dtype", "disable_custom_all_reduce", "tool_call_parser", "enable_auto_tool_choice",
    "reasoning_parser", "tokenizer_mode", "nnodes", "node_rank", "master_addr", "master_port", "headless",
    "distributed_executor_backend", "speculative_config", "api_key", "trust_remote_code",
)  # fmt: skip


def registries() -> tuple[set[str], set[str]]:
    """The names that a server of this version accepts."""
    return set(ToolParserManager.list_registered()), set(ReasoningParserManager.list_registered())


def parse(argv: list[str]) -> dict[str, Any]:
    """The values of one line, or the parser's own complaint; a parser that is named must exist and be importable."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser = FlexibleArgumentParser(prog="vllm")
            command = ServeSubcommand()
            command.subparser_init(parser.add_subparsers(dest="subparser"))
            values = parser.parse_args(argv)
            command.validate(values)
            tools, reasoners = registries()
            if values.tool_call_parser and values.tool_call_parser not in tools:
                raise ValueError(f"no tool parser {values.tool_call_parser}")
            if values.reasoning_parser and values.reasoning_parser not in reasoners:
                raise ValueError(f"no reasoning parser {values.reasoning_parser}")
            if values.tool_call_parser:
                ToolParserManager.get_tool_parser(values.tool_call_parser)
            if values.reasoning_parser:
                ReasoningParserManager.get_reasoning_parser(values.reasoning_parser)
    except SystemExit:
        return {"error": said.getvalue()[-2000:]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {key: getattr(values, key, None) for key in KEPT}


def main() -> None:
    lines = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        found = [parse(line) for line in lines]
    json.dump(found, sys.stdout, default=str)


if __name__ == "__main__":
    main()
