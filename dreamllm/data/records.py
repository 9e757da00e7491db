"""JSON records in files, with random access: only where they begin is kept in memory."""

from __future__ import annotations

import bisect
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm.data.problems import BadSampleError

LOUD_BYTES = 1 << 33
_CHUNK = 1 << 24
_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = b'"\\,\n'
_LIST, _LIST_END, _OBJECT, _OBJECT_END = b"[]{}"
_BOM = b"\xef\xbb\xbf"


class JsonRecords:
    """The elements of JSON lists, or the lines of JSON-lines files, of one or more files in turn.

    A file is a list when its name ends in `.json`. Records are parsed when they are asked for, so a broken one costs
    only itself. Eight bytes per record are kept; no file stays open.

    Raises `FileNotFoundError`, and `ValueError` for a `.json` file that is not a list or ends inside it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        assert paths
        self.paths = [Path(path) for path in paths]
        self._bounds: list[np.ndarray] = []
        self._stamps = [stamp(path) for path in self.paths]
        size = sum(size for size, _ in self._stamps)
        if size > LOUD_BYTES:
            warnings.warn(
                f"{size / 1e9:.0f} GB of JSON in {len(self.paths)} files ({self.paths[0]}) are read through at every "
                "start; tars with an index are not (`dreamllm data build`, then `dreamllm data index`)",
                stacklevel=3,
            )
        for path in self.paths:
            self._bounds.append(_list_bounds(path) if path.suffix == ".json" else _line_bounds(path))
        self._ends = np.cumsum([len(bounds) - 1 for bounds in self._bounds]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> tuple[Any, str]:
        """The parsed record and its name. Raises `BadSampleError` when it cannot be read and `IndexError` outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is outside [0, {len(self)})")
        file = bisect.bisect_right(self._ends, index)
        path, bounds = self.paths[file], self._bounds[file]
        within = index - (self._ends[file - 1] if file else 0)
        name = f"{path.stem} sample {within}" if path.suffix == ".json" else f"{path.stem} line {within + 1}"
        start, stop = int(bounds[within]) + 1, int(bounds[within + 1])
        (data,) = read_pieces(path, [(start, stop - start)], self._stamps[file], name)
        return parse_json(data, name), name


def parse_json(data: bytes, name: str) -> Any:
    """Raises `BadSampleError` naming the sample for bytes that are not JSON in UTF-8."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError("malformed", f"{name} is not JSON in UTF-8: {error}") from error


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of modification in nanoseconds: what tells whether a file is still the same."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_pieces(path: Path, pieces: Sequence[tuple[int, int]], expected: tuple[int, int], name: str) -> list[bytes]:
    """Pieces (offset, size) of a file that must still have the stamp `expected`; `BadSampleError` otherwise.

    The file is opened once for all of them: on a network disk that costs more than reading.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != expected:
                raise BadSampleError("changed_file", f"{name}: {path} was changed after it was opened; start again")
            data = [os.pread(file.fileno(), size, offset) for offset, size in pieces]
    except FileNotFoundError as error:
        raise BadSampleError("changed_file", f"{name}: {path} has disappeared") from error
    except OSError as error:
        raise BadSampleError("truncated_archive", f"{name}: {path} cannot be read: {error}") from error
    if any(len(piece) != size for piece, (_, size) in zip(data, pieces, strict=True)):
        raise BadSampleError("truncated_archive", f"{name}: {path} ends inside this sample")
    return data


def _line_bounds(path: Path) -> np.ndarray:
    """The positions before and after each line; blanks after the last line are none."""
    found = [np.array([-1])]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 0
        while chunk := file.read(_CHUNK):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + start)
            start += len(chunk)
        bounds = np.concatenate(found)
        if int(bounds[-1]) + 1 < size:
            bounds = np.append(bounds, size)
        while len(bounds) > 1 and not os.pread(file.fileno(), 1 << 16, int(bounds[-2]) + 1).strip():
            bounds = bounds[:-1]
    return bounds


def _list_bounds(path: Path) -> np.ndarray:
    """The positions of the brackets around the list and of the commas between its elements."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is not JSON: it is empty")
    return _bounds(np.memmap(path, np.uint8, "r"), path)


def _bounds(data: np.ndarray, path: Path) -> np.ndarray:
    found = []
    quotes = depth = outer_brackets = 0
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        quoted = _unescaped_quotes(data, np.flatnonzero(chunk == _QUOTE) + start)
        brackets, steps = _outside(chunk, start, quoted, quotes)
        depths = np.concatenate([[depth], depth + np.cumsum(steps)])
        outer = brackets[np.maximum(depths[1:], depths[:-1]) <= 1]
        commas = np.flatnonzero(chunk == _COMMA) + start
        commas = commas[(np.searchsorted(quoted, commas) + quotes) % 2 == 0]
        commas = commas[depths[np.searchsorted(brackets, commas)] == 1]
        found.append(np.sort(np.concatenate([commas, outer])))
        quotes, depth, outer_brackets = (quotes + len(quoted)) % 2, int(depths[-1]), outer_brackets + len(outer)
    bounds = np.concatenate(found)
    _check_list(data, bounds, quotes, depth, outer_brackets, path)
    empty = outer_brackets == len(bounds) and not data[int(bounds[0]) + 1 : int(bounds[1])].tobytes().strip()
    return bounds[:1] if empty else bounds


def _check_list(data: np.ndarray, bounds: np.ndarray, quotes: int, depth: int, outer_brackets: int, path: Path) -> None:
    first = data[: 1 << 16].tobytes().removeprefix(_BOM).lstrip()[:1]
    if first != b"[":
        kind = "an object" if first == b"{" else f"something that begins {data[:20].tobytes()!r}"
        raise ValueError(f"{path} must hold a JSON list, not {kind}; a file with one object per line is named .jsonl")
    if quotes or depth > 0:
        raise ValueError(f"{path} is not JSON: the file ends inside its list; it may be cut short")
    last = int(bounds[-1])
    if outer_brackets != 2 or data[last] != _LIST_END or data[last + 1 :].tobytes().strip():
        raise ValueError(f"{path} is not JSON: its brackets do not match")


def _unescaped_quotes(data: np.ndarray, quotes: np.ndarray) -> np.ndarray:
    """Those of the positions `quotes` before which no odd number of backslashes stands."""
    keep = np.ones(len(quotes), bool)
    suspects, backslashes = np.arange(len(quotes)), 0
    while len(suspects):
        before = quotes[suspects] - 1 - backslashes
        suspects = suspects[(before >= 0) & (data[np.maximum(before, 0)] == _BACKSLASH)]
        keep[suspects] ^= True
        backslashes += 1
    return quotes[keep]


def _outside(chunk: np.ndarray, start: int, quoted: np.ndarray, carried: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the brackets outside strings, and +1 for an opening one, -1 for a closing one."""
    up = (chunk == _LIST) | (chunk == _OBJECT)
    down = (chunk == _LIST_END) | (chunk == _OBJECT_END)
    places = np.flatnonzero(up | down)
    steps = np.where(up[places], 1, -1)
    places = places + start
    outside = (np.searchsorted(quoted, places) + carried) % 2 == 0
    return places[outside], steps[outside]
