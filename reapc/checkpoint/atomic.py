"""Nothing half-written under its final name: partial names, fsync, rename; locks; room on the disk."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reapc.errors import CannotBeDone, ReapcError
from reapc.units import format_bytes


def partial_of(path: Path) -> Path:
    """The name that ``path`` has while it is written."""
    return path.with_name(path.name + ".partial")


def make_folder(path: Path) -> None:
    """Creates ``path``; a folder that cannot be written is an error that says what to set."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReapcError(
            f"{path}: cannot create this folder: {error.strerror}",
            hint="choose another place with --out, or set XDG_CACHE_HOME for the stage cache",
        ) from error
    if not os.access(path, os.W_OK):
        raise ReapcError(
            f"{path}: this folder is read-only",
            hint="choose another place with --out, or set XDG_CACHE_HOME for the stage cache",
        )


def sync_folder(path: Path) -> None:
    """fsync of a directory entry, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields the partial name (removed first); renamed to ``path`` on success, removed on an exception."""
    make_folder(path.parent)
    partial = partial_of(path)
    remove(partial)
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)) / path.name
            path.rename(old)
            partial.rename(path)
            remove(old.parent)
        else:
            partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """ReapcError where the folder that is to be written is there already."""
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another folder")


def claim_folder(folder: Path, identity: str, own: re.Pattern[str]) -> None:
    """Makes ``folder`` the work folder of the run that ``identity`` names, in a file of this name: what an interrupted
    run of the same left stays, what a run of another left is removed. ReapcError where there is something that no run
    left; ``own`` matches the names of what does."""
    make_folder(folder)
    stamp = folder / "identity"
    if not stamp.is_file() and not all(own.match(path.name) for path in folder.iterdir()):
        raise ReapcError(
            f"{folder}: this work folder holds something else, which is left untouched", hint="choose another --work"
        )
    if not stamp.is_file() or stamp.read_text() != identity:
        remove(folder)
        make_folder(folder)
        write_text(stamp, identity)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock file, so that two builds of the same stage wait for each other."""
    make_folder(path.parent)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that ``path`` is (or will be) on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_room(path: Path, needed_bytes: int, what: str) -> None:
    """CannotBeDone when the disk under ``path`` has less than ``needed_bytes`` free."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise CannotBeDone(
            f"{path}: {what} needs {format_bytes(needed_bytes)} of disk, {format_bytes(free)} are free "
            f"({format_bytes(needed_bytes - free)} too few)",
            hint="free some space, or choose another disk with --out and XDG_CACHE_HOME",
        )
