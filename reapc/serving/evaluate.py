"""lm-eval against a running server."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Progress
from reapc.schema import nearest
from reapc.serving.built import Built
from reapc.serving.client import LLAMA_PYTHON, LLAMA_SERVER, Client

EXTRA = "pip install 'reapc[eval]'"


def require_lm_eval() -> None:
    """CannotBeDone when lm-eval, or what it needs for servers, is not installed."""
    missing = [name for name in ("lm_eval", "tenacity", "aiohttp") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotBeDone(f"reapc eval needs {', '.join(missing)}, not installed here", hint=EXTRA)


def load_tasks(names: list[str], include: Path | None) -> Any:
    """lm-eval's TaskManager, after every task and its data could be loaded. ReapcError: no such task; CannotBeDone: its
    data is not to be had (data sets come from the Hugging Face hub)."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ReapcError(f"--include {include}: no such folder", hint="give the folder with the tasks' YAML files")
    manager = TaskManager(include_path=str(include) if include else None)
    for name in names:
        if not manager.match_tasks([name]):
            raise ReapcError(
                f"lm-eval knows no task {name!r}",
                hint=f"{nearest(name, manager.all_tasks)}`lm-eval ls tasks` lists them; --include FOLDER adds your own",
            )
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # whatever datasets, the hub or a task file raises
            said = " ".join(str(error).split())[:400]
            raise CannotBeDone(
                f"the task {name!r} cannot be loaded: {type(error).__name__}: {said}",
                hint="its data comes from the Hugging Face hub unless the task names local files: "
                "check the network, HF_HUB_OFFLINE and HF_HOME, or give a task with data of your own with --include",
            ) from error
    return manager


def evaluate(
    built: Built,
    client: Client,
    tasks: list[str],
    progress: Progress,
    *,
    limit: int | None,
    shots: int | None,
    include: Path | None,
    chat: bool,
    concurrency: int,
) -> dict[str, Any]:
    """lm-eval's results without the samples. ``client`` is connected."""
    require_lm_eval()
    manager = load_tasks(tasks, include)
    from lm_eval import simple_evaluate

    kind = client.info.kind
    model: Any
    arguments: dict[str, Any] | None = None
    if kind == LLAMA_PYTHON:
        raise CannotBeDone(
            f"{client.url}: llama_cpp.server takes no token ids, which lm-eval's tasks need",
            hint="serve the same GGUF with llama-server: reapc doctor --install",
        )
    if kind == LLAMA_SERVER and not chat:
        from reapc.serving.llama_eval import make_model

        model = make_model(client, concurrency, progress)
    else:
        model = "local-chat-completions" if chat else "local-completions"
        arguments = _arguments(built, client, chat, concurrency)
    try:
        found = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=tasks,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except ReapcError:
        raise
    except Exception as error:  # lm-eval and its tasks raise anything
        if not client.alive():
            raise CannotBeDone(f"{client.url}: the server stopped answering during the evaluation") from error
        said = " ".join(str(error).split())[:400]
        raise CannotBeDone(f"lm-eval failed: {type(error).__name__}: {said}", hint=_hint(said, chat)) from error
    if not found:
        raise CannotBeDone("lm-eval gave no results")
    return {key: value for key, value in found.items() if key != "samples"}


def _hint(said: str, chat: bool) -> str:
    if chat and "oglikelihood" in said:
        return "tasks that compare answers by likelihood need completions: leave --chat out"
    return ""


def _arguments(built: Built, client: Client, chat: bool, concurrency: int) -> dict[str, Any]:
    """What lm-eval's API models are given."""
    key = os.environ.get(client.key_variable)
    arguments: dict[str, Any] = {
        "model": client.info.model,
        "base_url": f"{client.url}/v1/{'chat/completions' if chat else 'completions'}",
        "num_concurrent": concurrency,
        "max_length": client.info.context or 2048,
        "header": {"Authorization": f"Bearer {key}"} if key else None,
    }
    if chat:
        return arguments
    return {
        **arguments,
        "tokenizer": str(tokenizer_folder(built).resolve()),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
    }


def tokenizer_folder(built: Built) -> Path:
    """The folder with the tokenizer of the served model: the checkpoint of the build, or for a GGUF the source, when
    that is a folder here."""
    places = [built.artifact]
    recipe = built.manifest.get("recipe") or {}
    source = str((recipe.get("model") or {}).get("source") or "")
    if source:
        places += [Path(str(recipe.get("base") or ".")) / source, Path(source)]
    for place in places:
        if place.is_dir() and ((place / "tokenizer.json").is_file() or (place / "tokenizer_config.json").is_file()):
            return place
    raise CannotBeDone(
        f"{built.folder}: no tokenizer beside the model ({', '.join(map(str, places))})",
        hint="lm-eval needs the model's tokenizer files; run where the source of the recipe is, or use --chat",
    )
