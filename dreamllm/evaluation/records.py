"""Answers on disk, one JSON line each: appended batch by batch, resumed after a kill, merged from shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamllm.training import write_text

RECORDS_FILE = "records.jsonl"


@dataclass(frozen=True)
class Shard:
    """Every `count`-th sample, from number `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count} does not exist; shards are 0 to {self.count - 1}")

    @staticmethod
    def parse(text: str) -> Shard:
        """`"2/8"` -> the third of eight. Raises `ValueError`."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"a shard is written INDEX/COUNT, for example 0/4, not {text!r}")
        return Shard(int(index), int(count))

    def samples(self, total: int) -> range:
        return range(self.index, total, self.count)

    def file(self, folder: Path) -> Path:
        return folder / f"answers-{self.index:05d}-of-{self.count:05d}.jsonl"


class AnswerFile:
    """The answers of one shard, in order. What is on disk at any moment is a prefix of the whole file."""

    def __init__(self, path: Path, indices: Sequence[int]) -> None:
        self._path = path
        self._indices = indices

    def resume(self, batch_size: int) -> int:
        """How many answers are there already, in whole batches; anything after them is cut off.

        A batch that was cut short is answered anew together, so that every answer is computed in the same company as
        without the interruption. Raises `ValueError` for a file that holds other samples.
        """
        rows = complete_lines(self._path)
        for row, expected in zip(rows, self._indices, strict=False):
            if row.get("index") != expected:
                raise ValueError(
                    f"{self._path} holds sample {row.get('index')} where {expected} belongs; remove the file"
                )
        kept = len(rows)
        if kept < len(self._indices):
            kept -= kept % batch_size
        if self._path.is_file():
            size = sum(len(line) for line in self._path.read_bytes().splitlines(keepends=True)[:kept])
            with open(self._path, "r+b") as file:
                file.truncate(size)
        return kept

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes the records of one batch and waits until they are on disk."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(self._path, "ab") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file up to the first line that is torn or not an object; none without a file."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line.decode("utf-8", "surrogatepass"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            break
        if not line.endswith(b"\n") or not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def merged(folder: Path, total: int, shards: int) -> list[dict[str, Any]] | None:
    """The answers of all shards in the order of the samples; None while any is missing."""
    found: dict[int, dict[str, Any]] = {}
    for index in range(shards):
        for row in complete_lines(Shard(index, shards).file(folder)):
            found[row["index"]] = row
    if len(found) < total:
        return None
    return [found[i] for i in range(total)]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """All records as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
