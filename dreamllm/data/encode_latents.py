"""Filling a latent cache: any number of processes, each a part of the documents, each able to go on after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreamllm.data.latent_files import (
    IDENTITY_FILE,
    FileHeader,
    LatentCacheError,
    LatentIndex,
    remove_partials,
    shard_names,
    write_shard,
)
from dreamllm.data.latents import LatentIdentity, picture_key
from dreamllm.data.preparation import picture_reason
from dreamllm.data.problems import BadSampleError, Problem, ProblemLog
from dreamllm.data.reader import Reader
from dreamllm.data.workers import START_METHOD, prepare_worker
from dreamllm.documents import PictureError, PictureSource, load_picture
from dreamllm.model.codec import encode_moments, vae_fingerprint

Storage = Literal["exact", "float32", "bfloat16", "float16"]
Precision = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TargetTransform(Protocol):
    """Pictures -> what the VAE encodes; implemented by `DreamLLMProcessor`."""

    def target(self, images: Sequence[Image.Image]) -> Tensor: ...

    def describe_target(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EncodeSettings:
    """How a cache is filled.

    - `storage`: dtype of the stored moments. "exact" is the one in which the VAE computes, so that training draws the
      bits that it would without a cache; a smaller one halves the cache and rounds.
    - `precision`: "bfloat16" runs the VAE under autocast, as a run of that precision does.
    - `mirrored`: also encode each picture mirrored, for runs with `flip_targets`.
    - `pictures_per_pass`: pictures that go through the VAE together. `pictures_per_shard`: pictures per file, and how
      much work a kill can cost. `workers`: processes that read and decode pictures.
    - `max_bad_fraction`: the tolerated share of unusable documents, see `ProblemLog`.
    """

    storage: Storage = "exact"
    precision: Precision = "float32"
    mirrored: bool = False
    pictures_per_pass: int = 8
    pictures_per_shard: int = 1024
    workers: int = 0
    max_bad_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.storage not in ("exact", *_DTYPES):
            raise ValueError(f"storage must be 'exact', {', '.join(map(repr, _DTYPES))}, not {self.storage!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', not {self.precision!r}")
        for name in ("pictures_per_pass", "pictures_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, not {self.workers}")


@dataclass
class EncodeReport:
    """`encoded`: pictures encoded by this process now. `known`: pictures met that the cache held already."""

    encoded: int = 0
    known: int = 0
    problems: ProblemLog = field(default_factory=ProblemLog)


def encode_latents(
    reader: Reader,
    vae: AutoencoderKL,
    transform: TargetTransform,
    out: Path,
    rank: int = 0,
    of: int = 1,
    settings: EncodeSettings | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> EncodeReport:
    """Encodes the pictures to create of the documents `rank`, `rank` + `of`, ... of `reader` into the cache `out`.

    Processes with different ranks may run at once or one after another, and again after a kill: what is in the cache is
    not encoded again. A cache grows by other data in the same way. `progress` is called with (documents done, all).

    Raises `ValueError` for a rank outside range(of), `LatentCacheError` for a cache of another VAE, transform or
    storage and when a file cannot be written, and `TooManyBadSamplesError`.
    """
    settings = settings or EncodeSettings()
    if not 0 <= rank < of:
        raise ValueError(f"rank must lie in 0 to {of - 1}, not {rank}")
    identity = _identity(vae, transform, settings)
    _agree(out, identity)
    shards = _Shards(out, f"{rank:04d}-of-{of:04d}", _digest(reader))
    total = len(range(rank, len(reader), of))
    documents = range(max(rank, shards.next_document), len(reader), of)
    run = _Run(vae, settings, _DTYPES[identity.dtype], shards)
    for found in _found(_Pictures(reader, transform, LatentIndex.open(out), settings.mirrored), documents, settings):
        run.take(found, found.index + of)
        progress((found.index - rank) // of + 1, total)
    run.finish(documents.stop + of)
    LatentIndex.open(out)  # so that it is there, with this process's shards
    return run.report


def _identity(vae: AutoencoderKL, transform: TargetTransform, settings: EncodeSettings) -> LatentIdentity:
    exact = "bfloat16" if settings.precision == "bfloat16" else str(vae.dtype).removeprefix("torch.")
    dtype = exact if settings.storage == "exact" else settings.storage
    return LatentIdentity(
        vae_fingerprint(vae), transform.describe_target(), dtype, settings.precision, settings.mirrored
    )


def _agree(out: Path, identity: LatentIdentity) -> None:
    """Makes the cache, or checks that the one that is there is the same."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / IDENTITY_FILE).exists():
        identity.write(out)
    there = LatentIdentity.read(out)
    different = there.differences(identity.vae, identity.transform)
    different += [
        f"{name}: cache {getattr(there, name)}, asked for {getattr(identity, name)}"
        for name in ("dtype", "precision", "mirrored")
        if getattr(there, name) != getattr(identity, name)
    ]
    if different:
        raise LatentCacheError(
            f"{out} holds another latent cache:\n  "
            + "\n  ".join(different)
            + "\ngive another --out, or the same options"
        )


def _digest(reader: Reader) -> str:
    return hashlib.blake2b(json.dumps(reader.describe(), sort_keys=True).encode(), digest_size=8).hexdigest()


# -- reading ------------------------------------------------------------


@dataclass
class _Found:
    """The pictures of document `index` that the cache lacks, ready for the VAE, and how many it has."""

    index: int
    pictures: list[tuple[bytes, Tensor]] = field(default_factory=list)
    known: int = 0
    problems: list[Problem] = field(default_factory=list)


class _Pictures(Dataset):
    """`pictures[i]`: what is to be encoded of document i."""

    def __init__(self, reader: Reader, transform: TargetTransform, index: LatentIndex, mirrored: bool) -> None:
        self.reader, self.transform, self.index = reader, transform, index
        self.mirrored = (False, True) if mirrored else (False,)

    def __getitem__(self, index: int) -> _Found:
        found = _Found(index)
        try:
            document = self.reader.document(index)
        except BadSampleError as error:
            found.problems.append(Problem(error.reason, str(error)))
            return found
        for picture in document.pictures():
            if not picture.creation:
                continue
            try:
                self._add(found, picture.source)
            except PictureError as error:
                found.problems.append(Problem(picture_reason(error), f"{document.name or '(unnamed)'}: {error}"))
        return found

    def _add(self, found: _Found, source: PictureSource) -> None:
        image = None
        for mirrored in self.mirrored:
            key = picture_key(source, mirrored)
            if self.index.find(key) is not None:
                found.known += 1
                continue
            image = image or load_picture(source)
            turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            found.pictures.append((key, self.transform.target([turned])[0]))


def _found(pictures: _Pictures, documents: range, settings: EncodeSettings) -> Iterator[_Found]:
    yield from DataLoader(
        pictures,
        batch_size=None,
        sampler=documents,
        num_workers=settings.workers,
        worker_init_fn=prepare_worker,
        multiprocessing_context=START_METHOD if settings.workers else None,
    )


# -- encoding and writing ------------------------------------------------------------


@dataclass(frozen=True)
class _Waiting:
    document: int
    key: bytes
    pixels: Tensor


class _Run:
    """Gathers pictures to full passes through the VAE, and what it makes of them to shards."""

    def __init__(self, vae: AutoencoderKL, settings: EncodeSettings, dtype: torch.dtype, shards: _Shards) -> None:
        self.vae, self.settings, self.dtype, self.shards = vae, settings, dtype, shards
        self.report = EncodeReport(problems=ProblemLog(settings.max_bad_fraction))
        self.waiting: list[_Waiting] = []
        self.met: set[bytes] = set()

    def take(self, found: _Found, following: int) -> None:
        """`following`: the number of the next document of this process."""
        self.report.problems.add(0 if found.problems else 1, found.problems)
        self.report.known += found.known
        for key, pixels in found.pictures:
            if key in self.met:
                self.report.known += 1
            else:
                self.met.add(key)
                self.waiting.append(_Waiting(found.index, key, pixels))
        while len(self.waiting) >= self.settings.pictures_per_pass:
            self._encode(following)

    def finish(self, following: int) -> None:
        if self.waiting:
            self._encode(following)
        self.shards.write(following)

    def _encode(self, following: int) -> None:
        size = self.settings.pictures_per_pass
        batch, self.waiting = self.waiting[:size], self.waiting[size:]
        pixels = torch.stack([picture.pixels for picture in batch]).to(self.vae.device)
        with torch.no_grad(), self._autocast():
            moments = encode_moments(self.vae, pixels)
        self.shards.add([picture.key for picture in batch], moments.to(self.dtype).cpu())
        self.report.encoded += len(batch)
        if self.shards.waiting >= self.settings.pictures_per_shard:
            self.shards.write(self.waiting[0].document if self.waiting else following)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.vae.device.type, torch.bfloat16)


class _Shards:
    """The shards that one process writes. Each records up to which document the process was done with it."""

    def __init__(self, folder: Path, prefix: str, data: str) -> None:
        self.folder, self.prefix, self.data = folder, prefix, data
        self._keys: list[bytes] = []
        self._moments: list[Tensor] = []
        remove_partials(folder, f"{prefix}.")
        own = {int(name.split(".")[1]): name for name in shard_names(folder) if name.startswith(f"{prefix}.")}
        self._number = 1 + max(own, default=-1)
        self.next_document = 0
        for number in range(len(own)):
            if number not in own:  # it was removed: what the later ones say of the documents before them is void
                break
            metadata = FileHeader.of(folder / own[number]).metadata
            if metadata.get("data") == data:
                self.next_document = max(self.next_document, int(metadata["next_document"]))

    @property
    def waiting(self) -> int:
        """Pictures that are in no file yet."""
        return len(self._keys)

    def add(self, keys: Sequence[bytes], moments: Tensor) -> None:
        self._keys += keys
        self._moments.append(moments)

    def write(self, next_document: int) -> None:
        """Writes a shard of what was added; `next_document` is the first whose pictures are not all in shards."""
        if not self._keys:
            return
        path = self.folder / f"{self.prefix}.{self._number:06d}.safetensors"
        metadata = {"data": self.data, "next_document": str(next_document)}
        write_shard(path, self._keys, torch.cat(self._moments), metadata)
        self._keys, self._moments = [], []
        self._number += 1
