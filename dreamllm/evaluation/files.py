"""Looking into a data folder: what is needed, what is there, and errors that say both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

SHOWN = 8
Kind = Literal["text", "number", "id", "list"]
_KINDS: dict[Kind, Any] = {"text": str, "number": int, "id": (str, int), "list": list}


class DataFolderError(ValueError):
    """A data folder without what a benchmark needs. The message says what was looked for and what is there."""


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that is a file in `folder`. Raises `DataFolderError`."""
    return _find(folder, names, "file")


def find_folder(folder: Path, *names: str) -> Path:
    """The first of `names` that is a folder in `folder`. Raises `DataFolderError`."""
    return _find(folder, names, "folder")


def _find(folder: Path, names: Sequence[str], kind: str) -> Path:
    for name in names:
        path = folder / name
        if path.is_file() if kind == "file" else path.is_dir():
            return path
    if not folder.is_dir():
        raise DataFolderError(f"the data folder {folder} does not exist")
    wanted = " or ".join(names)
    raise DataFolderError(f"{folder} has no {kind} {wanted}; it holds {listing(folder)}")


def listing(folder: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "nothing"


def read_json(path: Path) -> Any:
    """Raises `DataFolderError` naming the place of what is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataFolderError(f"{path} is not JSON: {error}") from error


def read_json_lines(path: Path) -> list[Any]:
    """Raises `DataFolderError` naming the line that is not JSON. Empty lines are passed over."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataFolderError(f"{path} is not a text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataFolderError(f"{path}, line {number}, is not JSON: {error}") from error
    return rows


def entries(path: Path, values: Any, key: str | None = None) -> list[dict[str, Any]]:
    """`values`, or `values[key]`, as a list of objects. Raises `DataFolderError` describing what is there instead."""
    found = values
    if key is not None:
        if not isinstance(values, dict) or key not in values:
            there = (
                f"it has {', '.join(map(str, list(values)[:SHOWN]))}" if isinstance(values, dict) else "it is a list"
            )
            raise DataFolderError(f"{path} has no entry {key!r}; {there}")
        found = values[key]
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataFolderError(f"{path}{f', {key!r},' if key else ''} must be a list of objects")
    return found


def value(path: Path, entry: dict[str, Any], name: str, number: int, kind: Kind = "text") -> Any:
    """`entry[name]`: a text, a whole number, one of both (an `id`), or a list. Raises `DataFolderError` with the
    entry's number and what it has instead."""
    if name not in entry:
        there = ", ".join(map(str, list(entry)[:SHOWN])) or "nothing"
        raise DataFolderError(f"{path}: entry {number} has no {name!r}; it has {there}")
    found = entry[name]
    if not isinstance(found, _KINDS[kind]) or isinstance(found, bool):
        raise DataFolderError(f"{path}: {name!r} of entry {number} must be a {kind}, not {repr(found)[:60]}")
    return found


def texts(path: Path, entry: dict[str, Any], name: str, number: int, key: str | None = None) -> tuple[str, ...]:
    """`entry[name]`, a list of texts, or of objects with a text `key`. Raises `DataFolderError` for anything else."""
    found = value(path, entry, name, number, "list")
    if key is not None:
        found = [item.get(key) if isinstance(item, dict) else None for item in found]
    if not all(isinstance(text, str) for text in found):
        wanted = "texts" if key is None else f"objects with a text {key!r}"
        raise DataFolderError(
            f"{path}: {name!r} of entry {number} must be a list of {wanted}, not {repr(entry[name])[:60]}"
        )
    return tuple(found)


def check_pictures(paths: Iterable[Path], where: Path) -> None:
    """Raises `DataFolderError` with the number and the first names of pictures that `where` does not have."""
    wanted = list(dict.fromkeys(paths))
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        names = ", ".join(
            str(path.relative_to(where)) if path.is_relative_to(where) else str(path) for path in missing[:3]
        )
        more = ", ..." if len(missing) > 3 else ""
        raise DataFolderError(
            f"{len(missing)} of {len(wanted)} pictures are missing from {where}: {names}{more}; "
            "use --limit to evaluate on the first samples only"
        )
