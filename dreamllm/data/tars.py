"""Image-text pairs in webdataset tars, with random access."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamllm.data.pairs import IMAGE_SUFFIXES, Pair, PairSource, checked_caption
from dreamllm.data.problems import BadSampleError


@dataclass(frozen=True)
class _Member:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


@dataclass
class _Sample:
    tar: int
    key: str
    image: _Member | None = None
    text: _Member | None = None
    json: _Member | None = None


class TarPairs(PairSource):
    """Pairs in webdataset tars: `<key>.jpg|jpeg|png|webp` and `<key>.txt`, or `<key>.json`.

    The caption is the `.txt` member, or the `.json` member's `json_caption_key`; when that is not given, `"caption"` of
    the `.json` member serves samples without a `.txt`.

    The tars are scanned once, reading only headers; a sample is then read by its offset. No file stays open. Order:
    that of the tars as given and of the samples in them. A tar that ends early gives the samples before the break and
    counts the one that it cuts.

    Raises `ValueError` for a file that is not a tar, `FileNotFoundError` for one that is missing.
    """

    def __init__(self, tars: Sequence[Path], json_caption_key: str | None = None, name: str = "") -> None:
        if not tars:
            raise ValueError("no tar files were given")
        self.tars = [Path(tar) for tar in tars]
        self.json_caption_key = json_caption_key
        self.name = name or (self.tars[0].name if len(self.tars) == 1 else self.tars[0].parent.name)
        self._samples: list[_Sample] = []
        for number, tar in enumerate(self.tars):
            self._samples.extend(_scan(number, tar))

    def __len__(self) -> int:
        return len(self._samples)

    def pair(self, index: int) -> Pair:
        sample = self._samples[index]
        name = f"{self.tars[sample.tar].name}:{sample.key}"
        if sample.image is None:
            raise BadSampleError("missing_image", f"{name} has no picture ({', '.join(IMAGE_SUFFIXES)})")
        caption = checked_caption(self._caption(sample, name), name)
        return Pair(self._read(sample, sample.image, name), caption, name)

    def _caption(self, sample: _Sample, name: str) -> str:
        key = self.json_caption_key
        if key is None and sample.text is not None:
            return _decode(self._read(sample, sample.text, name), name)
        if sample.json is None:
            wanted = f"{sample.key}.txt" if key is None else f"{sample.key}.json"
            raise BadSampleError("missing_caption", f"{name} has no caption {wanted}")
        try:
            values = json.loads(_decode(self._read(sample, sample.json, name), name))
        except json.JSONDecodeError as error:
            raise BadSampleError("malformed", f"the JSON of {name} cannot be read: {error}") from error
        caption = values.get(key or "caption") if isinstance(values, dict) else None
        if not isinstance(caption, str):
            raise BadSampleError("missing_caption", f"the JSON of {name} has no text under {key or 'caption'!r}")
        return caption

    def _read(self, sample: _Sample, member: _Member, name: str) -> bytes:
        path = self.tars[sample.tar]
        try:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), member.size, member.offset)
        except FileNotFoundError as error:
            raise BadSampleError("truncated_archive", f"{path} has disappeared") from error
        if len(data) != member.size:
            raise BadSampleError("truncated_archive", f"{name}: {path} ends inside this sample")
        return data


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("malformed", f"the caption of {name} is not UTF-8: {error}") from error


def _scan(number: int, path: Path) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                if member.isfile():
                    _place(samples, number, member)
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is not an uncompressed tar: {error}") from error
    return list(samples.values())


def _members(tar: tarfile.TarFile):
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:  # the file ends inside a member: what came before is whole
            return
        if member is None:
            return
        yield member


def _place(samples: dict[str, _Sample], number: int, member: tarfile.TarInfo) -> None:
    folder, file = os.path.split(member.name)
    stem, _, suffix = file.partition(".")
    if not stem:
        return
    key = os.path.join(folder, stem)
    suffix = "." + suffix.lower()
    where = _Member(member.offset_data, member.size)
    if suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
        return
    sample = samples.setdefault(key, _Sample(number, key))
    if suffix == ".txt":
        sample.text = where
    elif suffix == ".json":
        sample.json = where
    else:
        sample.image = sample.image or where
