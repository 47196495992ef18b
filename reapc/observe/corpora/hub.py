"""Rows of hub data sets, streamed: only what is needed is downloaded, and nothing is kept on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reapc.errors import CannotBeDone, ReapcError
from reapc.mix import MixSource

BUFFER = 1000  # rows to shuffle among; the files of a data set are shuffled too


def rows(name: str, source: MixSource, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and columns of each row of the hub data set ``name``, shuffled among ``BUFFER`` rows.

    CannotBeDone where the hub does not deliver it (not there, gated, no network); ReapcError for a config, split or
    revision that it does not have."""
    try:
        yield from enumerate(_stream(name, source, seed))
    except Exception as error:  # datasets passes on whatever fsspec, httpx, pyarrow and the hub raise
        raise _hub_error(name, source, error) from error


def _stream(name: str, source: MixSource, seed: int) -> Any:
    from huggingface_hub import HfApi

    # asked once, before `datasets` tries for half a minute; all that follows is of this one commit
    commit = HfApi().dataset_info(name, revision=source.revision, timeout=30).sha

    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset(name, source.config, split=source.split, revision=commit, streaming=True)
    return found.shuffle(seed=seed, buffer_size=BUFFER)


def _hub_error(name: str, source: MixSource, error: Exception) -> ReapcError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    text = " ".join(str(error).split())
    what = f"{source.name} (revision {source.revision or 'main'})"
    if isinstance(error, GatedRepoError) or "is a gated dataset" in text:
        return CannotBeDone(
            f"{what}: the data set is gated",
            hint=f"accept its terms at huggingface.co/datasets/{name}, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError):
        return CannotBeDone(
            f"{what}: the hub has no such data set, or not for you",
            hint="check the name; a private data set needs `hf auth login` or HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return ReapcError(f"{what}: the hub has no such revision", hint="a branch, a tag or a commit")
    if isinstance(error, ValueError) and any(word in text for word in ("split", "config", "BuilderConfig")):
        return ReapcError(f"{what}: {text}", hint="config and split of the source")
    return CannotBeDone(
        f"{what}: the hub did not deliver it: {type(error).__name__}: {text[:300]}",
        hint="check the network (HF_ENDPOINT, HF_TOKEN), or give a local .jsonl",
    )
