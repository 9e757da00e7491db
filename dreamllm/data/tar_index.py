"""Which members of tars belong to which sample: found by scanning, or read from an index file that stays on disk.

The index file is in the safetensors format: its header's metadata lists the tars with their sizes and times, and its
arrays hold the samples of one tar after another:

    members  uint64 [M, 2]   offset in the tar; size
    names    uint32 [M]      end of the member's name among the names of its tar
    samples  uint32 [S]      end of the sample's members among those of its tar
    text     uint8  [B]      names, one after another
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from dreamllm.data.records import stamp
from dreamllm.data.tar_scan import Damage, Member, walk

Layout = Literal["pairs", "interleaved"]

FORMAT = "dreamllm tar index 1"
SUFFIX = "dreamllm-index"
_LOOKUPS_BEFORE_RELEASE = 256
_ARRAYS: dict[str, np.dtype[Any]] = {
    "members": np.dtype("<u8"),
    "names": np.dtype("<u4"),
    "samples": np.dtype("<u4"),
    "text": np.dtype("u1"),
}
_SAFETENSORS_NAMES = {"members": "U64", "names": "U32", "samples": "U32", "text": "U8"}


@dataclass(frozen=True)
class SampleTable:
    """The samples of one tar, each some of its members, as arrays (see the module's head)."""

    members: np.ndarray
    names: np.ndarray
    samples: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> tuple[Member, ...]:
        """The members of a sample in order."""
        first = int(self.samples[index - 1]) if index else 0
        stop = int(self.samples[index])
        where = self.members[first:stop].tolist()
        ends = self.names[first:stop].tolist()
        begin = int(self.names[first - 1]) if first else 0
        text = self.text[begin : ends[-1]].tobytes()
        starts = [0, *(end - begin for end in ends)]
        return tuple(Member(text[starts[i] : starts[i + 1]], offset, size) for i, (offset, size) in enumerate(where))

    @staticmethod
    def of(groups: Iterable[Sequence[Member]]) -> SampleTable:
        """The table of samples that are at hand."""
        members: list[tuple[int, int]] = []
        names: list[int] = []
        samples: list[int] = []
        text = bytearray()
        for group in groups:
            for member in group:
                text += member.name
                members.append((member.offset, member.size))
                names.append(len(text))
            samples.append(len(members))
        return SampleTable(
            np.array(members, _ARRAYS["members"]).reshape(-1, 2),
            np.array(names, _ARRAYS["names"]),
            np.array(samples, _ARRAYS["samples"]),
            np.frombuffer(bytes(text), _ARRAYS["text"]),
        )


Grouping = Callable[[Iterable[Member | Damage]], list[list[Member]]]


@dataclass(frozen=True)
class _IndexedTar:
    """One tar in the index: its path relative to the index's root, its stamp, and where its arrays lie."""

    path: str
    stamp: tuple[int, int]
    first: dict[str, int]
    count: dict[str, int]

    @property
    def samples(self) -> int:
        return self.count["samples"]


class TarIndex:
    """An index file, mapped into memory when first used.

    Pages that were looked at are given back to the system from time to time, so that the resident memory stays small
    however large the index is. Raises `ValueError` for a file that is not such an index or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tars, self._begin, self._total = _read_header(path)
        self._arrays: SampleTable | None = None
        self._mapping: mmap.mmap | None = None
        self._lookups = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": None, "_mapping": None}

    def numbers(self, root: Path | None) -> dict[tuple[str, tuple[int, int]], int]:
        """Number of each tar by identity and stamp."""
        assert root is not None
        base = root if root.is_dir() else root.parent
        return {(identity(base / tar.path), tar.stamp): number for number, tar in enumerate(self.tars)}

    def sample(self, tar: int, index: int) -> tuple[Member, ...]:
        members = self.table(tar).sample(index)
        self._lookups += 1
        if self._lookups % _LOOKUPS_BEFORE_RELEASE == 0 and self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return members

    def table(self, tar: int) -> SampleTable:
        """Views of one tar's arrays."""
        arrays, place = self._mapped(), self.tars[tar]
        slices = {name: slice(place.first[name], place.first[name] + place.count[name]) for name in _ARRAYS}
        return SampleTable(**{name: getattr(arrays, name)[where] for name, where in slices.items()})

    def _mapped(self) -> SampleTable:
        if self._arrays is None:
            with open(self.path, "rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if (again := _read_header(self.path)) != (self.tars, self._begin, self._total):
                raise ValueError(
                    f"the index {self.path} was replaced after it was opened ({len(again[0])} tars); start again"
                )
            arrays = {}
            begin = self._begin
            for name, dtype in _ARRAYS.items():
                arrays[name] = np.frombuffer(self._mapping, dtype, self._total[name] * _width(name), begin)
                begin += arrays[name].nbytes
            arrays["members"] = arrays["members"].reshape(-1, 2)
            self._arrays = SampleTable(**arrays)
        return self._arrays


def find_index(root: Path, layout: Layout, folder: Path | None = None) -> TarIndex | None:
    """The index of `root`, in `folder` if given, else beside it or in the user's cache; None when there is none.

    A file that cannot be used is told by a warning and counts as none.
    """
    places = (
        [cached_index_path(root, layout, folder)]
        if folder
        else [index_path(root, layout), cached_index_path(root, layout)]
    )
    for path in places:
        if path.is_file():
            try:
                return TarIndex(path)
            except ValueError as error:
                warnings.warn(f"{error}; the tars are scanned instead", stacklevel=4)
    return None


def index_path(root: Path, layout: Layout) -> Path:
    """Where the index of a folder or tar lies: in the folder, or beside the tar."""
    return root / f"{layout}.{SUFFIX}" if root.is_dir() else root.with_name(f"{root.name}.{layout}.{SUFFIX}")


def cached_index_path(root: Path, layout: Layout, folder: Path | None = None) -> Path:
    """Where the index lies when the data's own folder cannot be written: in `folder`, or ~/.cache/dreamllm."""
    place = Path("~/.cache/dreamllm/indices").expanduser() if folder is None else folder
    readable = "-".join(root.resolve().parts[-2:]).strip("/")
    return place / f"{readable}-{_digest(identity(root))}.{layout}.{SUFFIX}"


def write_index(
    tars: Sequence[Path],
    layout: Layout,
    group: Grouping,
    root: Path,
    path: Path,
    threads: int = 4,
    done: Callable[[Path], None] = lambda tar: None,
) -> TarIndex:
    """Scans `tars` and writes their index to `path`, beside and renamed. What an older index there knows is kept.

    `done` is called after each tar. Only one tar's arrays are in memory per thread. Raises `OSError` when `path` cannot
    be written and what `Archive` raises for tars.
    """
    base = root if root.is_dir() else root.parent
    before = find_older(path)
    known = {} if before is None else before.numbers(root)

    def table(tar: Path) -> tuple[SampleTable, tuple[int, int]]:
        now = stamp(tar)
        number = known.get((identity(tar), now))
        if number is not None:
            assert before is not None
            return before.table(number), now
        return SampleTable.of(group(walk(tar))), now

    with _IndexWriter(path) as writer, ThreadPoolExecutor(threads) as pool:
        for tar, (made, now) in zip(tars, pool.map(table, tars), strict=True):
            writer.add(_relative(tar, base), now, made)
            done(tar)
        writer.finish()
    return TarIndex(path)


def find_older(path: Path) -> TarIndex | None:
    try:
        return TarIndex(path)
    except (ValueError, OSError):
        return None


class _IndexWriter:
    """Collects the arrays in files beside `path`, which are joined at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        self.parts: dict[str, BinaryIO] = {}
        self.tars: list[dict[str, Any]] = []
        self.counts = dict.fromkeys(_ARRAYS, 0)

    def __enter__(self) -> _IndexWriter:
        try:
            for name in _ARRAYS:
                self.parts[name] = open(f"{self.beside}.{name}", "w+b")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name, file in self.parts.items():
            file.close()
            Path(f"{self.beside}.{name}").unlink(missing_ok=True)
        self.beside.unlink(missing_ok=True)

    def add(self, path: str, stamp: tuple[int, int], table: SampleTable) -> None:
        count = {name: len(getattr(table, name)) for name in _ARRAYS}
        self.tars.append({"path": path, "stamp": stamp, "first": dict(self.counts), "count": count})
        for name in _ARRAYS:
            getattr(table, name).tofile(self.parts[name])
            self.counts[name] += count[name]

    def finish(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "tars": json.dumps(self.tars)}}
        begin = 0
        for name, dtype in _ARRAYS.items():
            shape = [self.counts[name], 2] if name == "members" else [self.counts[name]]
            end = begin + self.counts[name] * _width(name) * dtype.itemsize
            header[name] = {"dtype": _SAFETENSORS_NAMES[name], "shape": shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(self.beside, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in self.parts.values():
                part.flush()
                part.seek(0)
                while chunk := part.read(1 << 22):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        self.beside.replace(self.path)


def _read_header(path: Path) -> tuple[list[_IndexedTar], int, dict[str, int]]:
    """The tars, where the arrays begin, and how many rows each has."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(length)) if length <= size else {}
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(metadata["format"])
        tars = [
            _IndexedTar(tar["path"], (tar["stamp"][0], tar["stamp"][1]), tar["first"], tar["count"])
            for tar in json.loads(metadata["tars"])
        ]
        rows = {name: header[name]["shape"][0] for name in _ARRAYS}
        if size != 8 + length + header["text"]["data_offsets"][1]:
            raise ValueError("it is cut short")
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a whole index of this version ({error})") from error
    return tars, 8 + length, rows


def _width(name: str) -> int:
    return 2 if name == "members" else 1


def _relative(tar: Path, base: Path) -> str:
    try:
        return str(tar.absolute().relative_to(base.absolute()))
    except ValueError:
        return str(tar.absolute())


def identity(path: Path) -> str:
    return os.path.abspath(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
