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
import os
import warnings
import weakref
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
_ARRAYS: dict[str, np.dtype[Any]] = {
    "members": np.dtype("<u8"),
    "names": np.dtype("<u4"),
    "samples": np.dtype("<u4"),
    "text": np.dtype("u1"),
}
_SAFETENSORS_NAMES = {"members": "U64", "names": "U32", "samples": "U32", "text": "U8"}


class StoredArray:
    """An array in a file, of which only slices are read."""

    def __init__(self, descriptor: int, offset: int, rows: int, dtype: np.dtype[Any], width: int = 1) -> None:
        self.descriptor, self.offset, self.rows, self.dtype, self.width = descriptor, offset, rows, dtype, width

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.rows)
        row_bytes = self.dtype.itemsize * self.width
        data = os.pread(self.descriptor, max(0, stop - start) * row_bytes, self.offset + start * row_bytes)
        array = np.frombuffer(data, self.dtype)
        return array if self.width == 1 else array.reshape(-1, self.width)


@dataclass(frozen=True)
class SampleTable:
    """The samples of one tar, each some of its members, as arrays (see the module's head), in memory or in a file."""

    members: np.ndarray | StoredArray
    names: np.ndarray | StoredArray
    samples: np.ndarray | StoredArray
    text: np.ndarray | StoredArray

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> tuple[Member, ...]:
        """The members of a sample in order."""
        first, stop = _bounds(self.samples, index, index + 1)
        begin, *ends = _bounds(self.names, first, stop)
        text = self.text[begin : ends[-1]].tobytes()
        where = self.members[first:stop].tolist()
        return tuple(
            Member(text[name_start - begin : name_end - begin], offset, size)
            for name_start, name_end, (offset, size) in zip((begin, *ends), ends, where, strict=False)
        )

    def loaded(self) -> SampleTable:
        """The same table in memory."""
        return SampleTable(self.members[:], self.names[:], self.samples[:], self.text[:])

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


def _bounds(ends: np.ndarray | StoredArray, first: int, stop: int) -> list[int]:
    """Where item `first` begins, and the ends of the items up to `stop`, from an array of ends."""
    return ends[first - 1 : stop].tolist() if first else [0, *ends[0:stop].tolist()]


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
    """An index file, from which only what is asked for is read: its size costs no memory.

    Each process that reads keeps it open, so that replacing it disturbs nobody. (Mapped into memory it would grow the
    resident memory by up to 2 MiB per place that is looked at.) Raises `ValueError` for a file that is not such an
    index or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.tars, self._begin, self._rows = _read_header(path, file)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}

    def numbers(self, root: Path | None) -> dict[tuple[str, tuple[int, int]], int]:
        """Number of each tar by identity and stamp."""
        assert root is not None
        base = root if root.is_dir() else root.parent
        return {(identity(base / tar.path), tar.stamp): number for number, tar in enumerate(self.tars)}

    def table(self, tar: int) -> SampleTable:
        """The samples of one tar. Raises `ValueError` when the file was replaced before it was first read."""
        descriptor, place = self._opened(), self.tars[tar]
        arrays = {}
        begin = self._begin
        for name, dtype in _ARRAYS.items():
            row_bytes = dtype.itemsize * _width(name)
            offset = begin + place.first[name] * row_bytes
            arrays[name] = StoredArray(descriptor, offset, place.count[name], dtype, _width(name))
            begin += self._rows[name] * row_bytes
        return SampleTable(**arrays)

    def _opened(self) -> int:
        if self._descriptor is None:
            with open(self.path, "rb") as file:
                if _read_header(self.path, file) != (self.tars, self._begin, self._rows):
                    raise ValueError(f"the index {self.path} was replaced after it was opened; start again")
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor


def find_index(root: Path, layout: Layout, folder: Path | None = None) -> TarIndex | None:
    """The index of `root`, in `folder` if given, else beside it or in the user's cache; None when there is none.

    A file that cannot be used is told by a warning and counts as none.
    """
    places = [cached_index_path(root, layout, folder)]
    if folder is None:
        places.insert(0, index_path(root, layout))
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
            return before.table(number).loaded(), now
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
            self.parts[name].write(getattr(table, name)[:].tobytes())
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


def _read_header(path: Path, file: BinaryIO) -> tuple[list[_IndexedTar], int, dict[str, int]]:
    """The tars, where the arrays begin, and how many rows each has."""
    try:
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
