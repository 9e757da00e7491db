"""Paths of data: what exists, what it holds, and messages that say what was looked for."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

from dreamllm.data.pairs import IMAGE_SUFFIXES, files_below

_REMOTE = re.compile(r"^([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])", re.IGNORECASE)
_BEGINNING = 1 << 16


class UnknownDataError(ValueError):
    """A path that holds no data of a known kind. The message says what was looked for and what was found."""


def existing(path: str | Path) -> Path:
    """`path` as a `Path`. Raises `ValueError` for a URL and `FileNotFoundError` for what does not exist."""
    if remote := _REMOTE.match(str(path)):
        raise ValueError(
            f"{path} is on {remote[1].lower()}, which is not read directly; copy the data to a disk, or mount the "
            "store as a folder, and give that path"
        )
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data {path} does not exist")
    return path


def find_tars(path: Path) -> list[Path]:
    """A tar itself, all tars below a folder, or those of a JSON list, relative to it. Raises `UnknownDataError`."""
    if path.suffix == ".tar":
        return [path]
    if path.is_file() and path.suffix == ".json":
        return _listed_tars(path)
    tars = sorted(Path(file) for file in files_below(path) if file.endswith(".tar"))
    if not tars:
        compressed = next((name for file in files_below(path) if ".tar." in (name := os.path.basename(file))), None)
        hint = f" ({compressed} is compressed: unpack it, tars are read by offset)" if compressed else ""
        raise unknown(path, ("*.tar (webdataset)", "a .json list of tars"), hint)
    return tars


def is_tar_list(path: Path) -> bool:
    """Whether a file is a JSON list of tars, as the original names its shards."""
    return path.is_file() and path.suffix == ".json" and bool(re.match(r'\s*\[\s*"[^"]*\.tar"', beginning(path)))


def _listed_tars(path: Path) -> list[Path]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON list of tars: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is not a JSON list of tars")
    return [existing(name if _REMOTE.match(name) else path.parent / name) for name in names]


def find_lines(path: Path) -> list[Path]:
    """The JSON-lines files of interleaved documents at `path`. Raises `UnknownDataError`."""
    if path.is_file():
        return [path]
    files = files_with(path, ".jsonl", '"text_list"')
    if not files:
        raise unknown(path, ("*.jsonl with text_list and image_info",))
    return files


def find_json(path: Path, key: str) -> Path:
    """The one JSON file at `path` in whose beginning `key` stands. Raises `UnknownDataError`."""
    if path.is_file():
        return path
    files = files_with(path, ".json", key) or files_with(path, ".jsonl", key)
    if not files:
        raise unknown(path, (f"*.json or *.jsonl with {key}",))
    return only(files, path)


def files_with(path: Path, suffix: str, key: str) -> list[Path]:
    """The files with `suffix` in whose first 64 KiB `key` stands."""
    candidates = [path] if path.is_file() else sorted(path.glob(f"*{suffix}"))
    return [file for file in candidates if file.suffix == suffix and _begins_with(file, key)]


def _begins_with(file: Path, key: str) -> bool:
    # Thousands of files may be looked into, and nearly always the first page tells.
    return key in beginning(file, 1 << 12) or key in beginning(file)


def only(files: list[Path], path: Path) -> Path:
    """The one file. Raises `UnknownDataError` when there are several."""
    if len(files) > 1:
        raise UnknownDataError(
            f"{path} holds several data files ({', '.join(f.name for f in files)}); name one of them"
        )
    return files[0]


def has_a_pair(root: Path) -> bool:
    """Whether some picture below `root` has a caption beside it."""
    for file in files_below(root):
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(f"{stem}.txt"):
            return True
    return False


def beginning(path: Path, size: int = _BEGINNING) -> str:
    """The first `size` bytes as text."""
    with open(path, "rb") as file:
        return file.read(size).decode("utf-8-sig", "replace")


def unknown(path: Path, looked_for: tuple[str, ...], hint: str = "") -> UnknownDataError:
    """The error that says what was looked for in `path` and what it holds instead."""
    wanted = "\n".join(f"  - {kind}" for kind in looked_for)
    return UnknownDataError(
        f"{path} holds no data of a known kind. Looked for\n{wanted}\nand found {_found(path)}{hint}"
    )


def _found(path: Path) -> str:
    if path.is_file():
        return f"one file of {path.stat().st_size} bytes, beginning {json.dumps(beginning(path)[:40])}"
    counts = Counter(os.path.splitext(file)[1].lower() or "(no suffix)" for file in files_below(path))
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8)) or "an empty folder"
