"""Files of a latent cache: shards of posterior moments keyed by content, and an index over all of them.

    CACHE/latents.json                        what the moments are of, see `LatentIdentity`
    CACHE/0003-of-0008.000012.safetensors     keys uint8 [n, 16], moments [n, 2c, h, w]
    CACHE/index.safetensors                   high, low uint64 [n] (sorted keys), shard, row int32 [n]

Every file is written beside its place and renamed: what has its name is whole. The index can be made from the shards at
any time; it records of which, so that one that is older than the newest shard is noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors

KEY_BYTES = 16
INDEX_FILE, IDENTITY_FILE, PARTIAL = "index.safetensors", "latents.json", ".partial"
_SHARD_PATTERN = "[0-9]*-of-[0-9]*.[0-9]*.safetensors"
_NUMPY = {"U8": np.uint8, "U64": np.uint64, "I32": np.int32}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class LatentCacheError(ValueError):
    """A latent cache that cannot be used, or does not hold what is needed. The message says what to do."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file: where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class FileHeader:
    """The header of a safetensors file, from which any part of a tensor can be read by its offset."""

    path: Path
    tensors: Mapping[str, _Stored]
    metadata: Mapping[str, str]

    @staticmethod
    def of(path: Path) -> FileHeader:
        """Reads the header. Raises `LatentCacheError` for a file that is not complete."""
        try:
            with open(path, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                if size > os.fstat(file.fileno()).st_size:
                    raise ValueError(f"its header would have {size} bytes")
                values = json.loads(file.read(size))
            metadata = values.pop("__metadata__", {})
            tensors = {name: _stored(entry, 8 + size) for name, entry in values.items()}
            end = max((stored.offset + stored.size for stored in tensors.values()), default=8 + size)
            if path.stat().st_size != end:
                raise ValueError(f"{path.stat().st_size} bytes instead of {end}")
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise LatentCacheError(
                f"{path} is damaged ({error}); remove it and encode its pictures again with the same command"
            ) from error
        return FileHeader(path, tensors, metadata)

    def array(self, name: str) -> np.ndarray:
        """The whole tensor, as a read-only map of the file."""
        stored = self.tensors[name]
        if not stored.size:
            return np.zeros(stored.shape, _NUMPY[stored.dtype])
        return np.memmap(self.path, _NUMPY[stored.dtype], "r", stored.offset, stored.shape)

    def row(self, name: str, number: int) -> torch.Tensor:
        """One row of a tensor of moments."""
        stored = self.tensors[name]
        size = stored.size // stored.shape[0]
        try:
            with open(self.path, "rb") as file:
                data = bytearray(os.pread(file.fileno(), size, stored.offset + number * size))
        except FileNotFoundError as error:
            raise LatentCacheError(f"{self.path} has disappeared; encode its pictures again") from error
        if len(data) != size:
            raise LatentCacheError(f"{self.path} ends early; remove it and encode its pictures again")
        return torch.frombuffer(data, dtype=_TORCH[stored.dtype]).view(stored.shape[1:])


def _stored(entry: Mapping[str, Any], base: int) -> _Stored:
    begin, end = entry["data_offsets"]
    return _Stored(entry["dtype"], tuple(entry["shape"]), base + begin, end - begin)


# -- shards ------------------------------------------------------------


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(_SHARD_PATTERN))


def write_shard(path: Path, keys: Sequence[bytes], moments: torch.Tensor, metadata: Mapping[str, str]) -> None:
    """Raises `LatentCacheError` when it cannot be written; nothing of it is left then."""
    tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
    tensors["moments"] = moments.contiguous()
    write_whole(path, lambda partial: save_tensors(tensors, partial, dict(metadata)))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside `path` and renames it. Raises `LatentCacheError` when that is not possible."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise LatentCacheError(
            f"{path} could not be written: {error}. What was written before is kept; make room and run the same "
            "command again"
        ) from error


def remove_partials(folder: Path, prefix: str) -> None:
    """Removes what a process that was killed has left of the files that begin with `prefix`."""
    for path in folder.glob(f"{prefix}*{PARTIAL}"):
        path.unlink(missing_ok=True)


# -- index ------------------------------------------------------------


class LatentIndex:
    """Where the moments of each key lie: (shard, row). Bounded memory: the table is a map of its file."""

    def __init__(self, shards: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        self.shards, self._columns = tuple(shards), dict(columns)

    def __len__(self) -> int:
        return len(self._columns["high"])

    def find(self, key: bytes) -> tuple[str, int] | None:
        high, low = struct.unpack(">QQ", key)
        at = int(np.searchsorted(self._columns["high"], np.uint64(high)))
        while at < len(self) and self._columns["high"][at] == high:
            if self._columns["low"][at] == low:
                return self.shards[self._columns["shard"][at]], int(self._columns["row"][at])
            at += 1
        return None

    @staticmethod
    def open(folder: Path) -> LatentIndex:
        """The index of all shards of `folder`; made anew, and written where that is possible, when it is older."""
        names = shard_names(folder)
        try:
            header = FileHeader.of(folder / INDEX_FILE)
            if json.loads(header.metadata["shards"]) == names:
                return LatentIndex(names, {name: header.array(name) for name in header.tensors})
        except (LatentCacheError, KeyError, ValueError):  # missing or damaged: it can be made again
            pass
        index = LatentIndex._merged(folder, names)
        with contextlib.suppress(LatentCacheError):  # a cache that one may only read
            write_whole(folder / INDEX_FILE, lambda p: save_arrays(index._columns, p, {"shards": json.dumps(names)}))
        return index

    @staticmethod
    def _merged(folder: Path, names: Sequence[str]) -> LatentIndex:
        keys, shards, rows = [np.zeros((0, KEY_BYTES), np.uint8)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, name in enumerate(names):
            found = FileHeader.of(folder / name).array("keys")
            keys.append(np.array(found))
            shards.append(np.full(len(found), number, np.int32))
            rows.append(np.arange(len(found), dtype=np.int32))
        pairs = np.concatenate(keys).view(">u8").astype(np.uint64)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        pairs = pairs[order]
        first = np.ones(len(pairs), bool)  # of equal keys: pictures that several processes met
        first[1:] = (pairs[1:] != pairs[:-1]).any(1)
        columns = {
            "high": pairs[first, 0].copy(),
            "low": pairs[first, 1].copy(),
            "shard": np.concatenate(shards)[order][first],
            "row": np.concatenate(rows)[order][first],
        }
        return LatentIndex(names, columns)
