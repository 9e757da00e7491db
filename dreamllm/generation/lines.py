"""A file of prompts: JSON lines, each an object with the fields of `Asked`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreamllm.generation.asked import Asked

MOST_SEED = 2**63 - 1
_SHOWN = 10


@dataclass(frozen=True)
class Line:
    """Line `number` (from 1) of a file: what it asks, or what is wrong with it."""

    number: int
    asked: Asked | None
    problem: str = ""


def read_lines(path: Path, defaults: Asked) -> list[Line]:
    """The prompts of a file; empty lines are passed over. A line without a seed has that of `defaults` plus its number.

    Raises `ValueError` for a file without prompts; `OSError` for one that cannot be read. What is wrong with a line is
    said in it.
    """
    data = path.read_bytes()
    lines = [_line(n, line, defaults, path.parent) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return lines


def check_lines(path: Path, lines: Sequence[Line]) -> None:
    """Raises `ValueError` that names the lines with which something is wrong."""
    wrong = [line for line in lines if line.asked is None]
    if wrong:
        shown = "\n".join(f"  line {line.number}: {line.problem}" for line in wrong[:_SHOWN])
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        what = "a line is" if len(wrong) == 1 else f"{len(wrong)} of {len(lines)} lines are"
        raise ValueError(f"{path}: {what} wrong; --keep-going answers the others\n{shown}{more}")


def _line(number: int, line: bytes, defaults: Asked, folder: Path) -> Line:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        if not isinstance(value, dict):
            raise ValueError('it must be an object, such as {"prompt": "Draw a seven."}')
        asked = _numbered(defaults, number).changed(value, folder)
        asked.check()
        return Line(number, asked)
    except (ValueError, RecursionError) as error:
        what = "not JSON: " if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError) else ""
        return Line(number, None, f"{what}{error}")


def _numbered(defaults: Asked, number: int) -> Asked:
    return replace(defaults, seed=min(defaults.seed + number, MOST_SEED))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
