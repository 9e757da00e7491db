"""The samples of tars, with random access: where they lie comes from an index, or from a scan at the start."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreamllm.data.problems import BadSampleError
from dreamllm.data.records import read_pieces, stamp
from dreamllm.data.tar_index import Grouping, Layout, SampleTable, find_index, identity
from dreamllm.data.tar_scan import Member, walk

LOUD_BYTES = 1 << 30
MAX_MEMBER_BYTES = 1 << 28
"""A larger member is not read: no picture or caption is that large, and one would exhaust the memory of a worker."""

MAX_BAD_TARS = 0.1
"""Largest share of files among the tars that may be none at all, such as downloads that failed."""


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar: its members in order. A damaged place is a sample of one member without a name."""

    tar: Path
    stamp: tuple[int, int]
    members: tuple[Member, ...]

    def read(self, members: Sequence[Member], name: str) -> list[bytes]:
        """The bytes of some members. Raises `BadSampleError` when the tar is shorter, changed or gone."""
        largest = max(member.size for member in members)
        if largest > MAX_MEMBER_BYTES:
            raise BadSampleError(
                "oversized", f"{name} has a member of {largest} bytes; at most {MAX_MEMBER_BYTES} are read"
            )
        return read_pieces(self.tar, [(member.offset, member.size) for member in members], self.stamp, name)

    def check(self) -> None:
        """Raises `BadSampleError` for a damaged place."""
        first = self.members[0]
        if not first.name:
            raise BadSampleError(
                "truncated_archive",
                f"{self.tar} is damaged between bytes {first.offset} and {first.offset + first.size}",
            )


class Archive:
    """The samples of tars in order, from a valid index where there is one, else from a scan.

    `root` is the folder or tar that was opened: the index lies beside it, or in `index_folder`. Tars that the index
    does not describe as they are now are scanned again, with a warning; so is every large set without an index.

    A file that is not a tar counts as one damaged sample, with a warning. Raises `ValueError` when more than
    `MAX_BAD_TARS` of them are, and `FileNotFoundError` for one that is missing.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        layout: Layout,
        group: Grouping,
        root: Path | None = None,
        index_folder: Path | None = None,
    ) -> None:
        self.tars = [Path(tar) for tar in tars]
        self._stamps = [stamp(tar) for tar in self.tars]
        self._index = None if root is None else find_index(root, layout, index_folder)
        numbers = {} if self._index is None else self._index.numbers(root)
        self._places: list[int | SampleTable] = []
        to_scan = []
        for number, (tar, now) in enumerate(zip(self.tars, self._stamps, strict=True)):
            known = numbers.get((identity(tar), now))
            self._places.append(-1 if known is None else known)
            if known is None:
                to_scan.append(number)
        self._tell(to_scan, root)
        self._scan(to_scan, group)
        counts = [self._count(place) for place in self._places]
        self._ends = np.cumsum(counts).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def indexed(self) -> int:
        """How many of the tars the index describes."""
        return sum(isinstance(place, int) for place in self._places)

    def sample(self, index: int) -> TarSample:
        """Raises `IndexError` outside the collection."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside [0, {len(self)})")
        tar = bisect.bisect_right(self._ends, index)
        within = index - (self._ends[tar - 1] if tar else 0)
        place = self._places[tar]
        if isinstance(place, SampleTable):
            members = place.sample(within)
        else:
            assert self._index is not None
            members = self._index.table(place).sample(within)
        return TarSample(self.tars[tar], self._stamps[tar], members)

    def _scan(self, numbers: list[int], group: Grouping) -> None:
        failures = []
        for number in numbers:
            tar = self.tars[number]
            try:
                self._places[number] = SampleTable.of(group(walk(tar)))
            except ValueError as error:
                failures.append(str(error))
                self._places[number] = SampleTable.of([[Member(b"", 0, self._stamps[number][0])]])
        if len(failures) > MAX_BAD_TARS * len(self.tars):
            of = f"; so are {len(failures) - 1} more of {len(self.tars)} tars" if len(failures) > 1 else ""
            raise ValueError(f"{failures[0]}{of}")
        for failure in failures:
            warnings.warn(f"{failure}; all its samples are lost, and counted as one", stacklevel=5)

    def _count(self, place: int | SampleTable) -> int:
        if isinstance(place, SampleTable):
            return len(place)
        assert self._index is not None
        return self._index.tars[place].samples

    def _tell(self, to_scan: list[int], root: Path | None) -> None:
        size = sum(self._stamps[number][0] for number in to_scan)
        command = f"run `dreamllm data index {root or 'PATH'}`"
        if self._index is not None and to_scan:
            warnings.warn(
                f"the index {self._index.path} does not describe {len(to_scan)} of {len(self.tars)} tars as they are "
                f"now (first {self.tars[to_scan[0]].name}); they are scanned again ({_amount(size)}); {command} once",
                stacklevel=4,
            )
        elif size > LOUD_BYTES:
            warnings.warn(
                f"{len(to_scan)} tars ({_amount(size)}) have no index and are scanned at every start; {command} once",
                stacklevel=4,
            )


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
