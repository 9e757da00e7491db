"""Looking into a data folder: what is needed, what is there, and errors that say both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SHOWN = 8


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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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


def value(path: Path, entry: dict[str, Any], name: str, number: int) -> Any:
    """`entry[name]`. Raises `DataFolderError` with the entry's number and the names that it has."""
    if name not in entry:
        there = ", ".join(map(str, list(entry)[:SHOWN])) or "nothing"
        raise DataFolderError(f"{path}: entry {number} has no {name!r}; it has {there}")
    return entry[name]


def check_pictures(paths: Iterable[Path], where: Path) -> None:
    """Raises `DataFolderError` with the number and the first names of pictures that do not exist."""
    wanted = list(dict.fromkeys(paths))
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        names = ", ".join(path.name for path in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        raise DataFolderError(
            f"{len(missing)} of {len(wanted)} pictures are missing from {where}: {names}{more}; "
            "use --limit to evaluate on the first samples only"
        )
