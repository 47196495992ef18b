"""The commands of other benchmarks against a running server: the panel of the REAP paper and what belongs to it.

Flags were read off evalplus 0.3.1, bfcl-eval 2026.3.23, evalscope 1.14.1 and mini-swe-agent 2.4.6 (their wheels) and
LiveCodeBench's main branch. Each tool lives in an environment of its own.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

# LiveCodeBench and BFCL take only models of their own lists: a line of Python adds the server's model to it first.
_LIVECODEBENCH = (
    "import sys; from datetime import datetime; "
    "from lcb_runner.lm_styles import LanguageModel, LanguageModelStore, LMStyle; "
    "name = sys.argv[sys.argv.index('--model') + 1]; "
    "LanguageModelStore[name] = "
    "LanguageModel(name, name.replace('/', '_'), LMStyle.OpenAIChat, datetime(2025, 1, 1), ''); "
    "from lcb_runner.runner.main import main; main()"
)
_BFCL = (
    "import sys; from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig; "
    "from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler; "
    "name = sys.argv[sys.argv.index('--model') + 1]; "
    "MODEL_CONFIG_MAPPING[name] = ModelConfig(name, name, '', '', '', OpenAICompletionsHandler, "
    "is_fc_model=True, underscore_to_dot=True); "
    "from bfcl_eval.__main__ import cli; cli()"
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: what to install, what to know, and its command lines."""

    name: str
    install: str
    note: str
    lines: tuple[str, ...]


def _line(variables: dict[str, str], words: list[str]) -> str:
    """A command line. Values of ``variables`` that begin with $ are expanded by the shell; all else is quoted."""
    before = [
        f'{name}="{value}"' if value.startswith("$") else f"{name}={shlex.quote(value)}"
        for name, value in variables.items()
    ]
    return " ".join([*before, *(word if word.startswith('"$') else shlex.quote(word) for word in words)])


def benchmarks(url: str, model: str, key_variable: str, concurrency: int = 4) -> list[Benchmark]:
    """The panel for the server at ``url`` (without /v1) that calls its model ``model``. The key stays in the variable
    ``key_variable`` (a word, "none", where it is not set)."""
    api = f"{url}/v1"
    key = f"${{{key_variable}:-none}}"
    openai = {"OPENAI_API_KEY": key}
    swe = [
        "mini-extra", "swebench", "--subset", "verified", "--split", "test", "--workers", str(concurrency),
        "--output", "mini-swe-agent", "--config", "swebench.yaml", "--model", f"openai/{model}",
        "--config", f"model.model_kwargs.api_base={api}", "--config", "model.cost_tracking=ignore_errors",
    ]  # fmt: skip
    scope = [
        "evalscope", "eval", "--model", model, "--api-url", api, "--api-key", f'"{key}"',
        "--eval-type", "openai_api", "--eval-batch-size", str(concurrency), "--datasets", "gsm8k", "math_500",
    ]  # fmt: skip
    bfcl = {"OPENAI_BASE_URL": api, **openai}
    categories = ["--test-category", "non_live,live,multi_turn"]
    return [
        Benchmark(
            "EvalPlus (HumanEval+, MBPP+)",
            "pip install evalplus==0.3.1",
            "it runs generated code on this machine: use a container",
            tuple(
                _line(
                    openai,
                    ["evalplus.evaluate", "--model", model, "--dataset", dataset, "--backend", "openai",
                     "--base-url", api, "--greedy"],
                )
                for dataset in ("humaneval", "mbpp")
            ),
        ),
        Benchmark(
            "LiveCodeBench",
            "git clone https://github.com/LiveCodeBench/LiveCodeBench && cd LiveCodeBench && pip install -e .",
            "run in its folder; it runs generated code on this machine: use a container",
            (
                _line(
                    {"OPENAI_BASE_URL": api, "OPENAI_KEY": key},
                    ["python", "-c", _LIVECODEBENCH, "--model", model, "--scenario", "codegeneration",
                     "--release_version", "release_v6", "--n", "1", "--temperature", "0", "--max_tokens", "16384",
                     "--openai_timeout", "1800", "--multiprocess", str(concurrency), "--evaluate"],
                ),
            ),
        ),
        Benchmark(
            "BFCL",
            "pip install bfcl-eval==2026.3.23",
            "the server must parse tool calls: vLLM with --enable-auto-tool-choice and a parser, llama-server as it is",
            (
                _line(bfcl, ["python", "-c", _BFCL, "generate", "--model", model, *categories,
                             "--num-threads", str(concurrency)]),
                _line(bfcl, ["python", "-c", _BFCL, "evaluate", "--model", model, *categories]),
            ),
        ),
        Benchmark("EvalScope (GSM8K, MATH-500)", "pip install evalscope==1.14.1", "", (_line({}, scope),)),
        Benchmark(
            "mini-SWE-agent (SWE-bench Verified)",
            "pip install mini-swe-agent==2.4.6",
            "needs Docker and x86; the predictions are scored by sb-cli or the swebench harness",
            (_line(openai, swe),),
        ),
    ]  # fmt: skip
