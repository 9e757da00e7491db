"""Files and folders that are either whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from dreamllm.training.errors import SaveError

PARTIAL = ".partial"


def write_json(path: Path, values: Any) -> None:
    """Writes `values` as `write_text` does. Raises `SaveError`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8 as `write_file` does; half characters, which models may write, pass."""
    write_file(path, lambda file: file.write(text.encode("utf-8", "surrogatepass")))


def write_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Lets `fill` write a file beside `path`, of this process alone, and renames. Raises `SaveError`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            fill(file)
        _sync(partial)
        partial.replace(path)
    except OSError as error:
        raise SaveError(f"{path} could not be written: {error}") from error


def write_folder(folder: Path, fill: Callable[[Path], None], what: str) -> None:
    """Lets `fill` write into a folder beside `folder` and renames it when complete, replacing what was there.

    Raises `SaveError` when something cannot be written; then the half-written folder is removed.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        complete_folder(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"{what} could not be written to {folder}: {first_line(error)}") from error


def complete_folder(partial: Path, folder: Path) -> None:
    """Makes what is in `partial` durable and renames it to `folder`, replacing what was there."""
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    _sync(folder.parent)


def make_folder(folder: Path) -> None:
    """Creates `folder`. Raises `SaveError` when it cannot be created or written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write{PARTIAL}"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have looked at the same moment
    except OSError as error:
        raise SaveError(f"folder {folder} cannot be written: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """For one process at a time of those that share `folder`."""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
