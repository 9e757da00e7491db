"""Image-text pairs in webdataset tars, with random access."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dreamllm.data.archive import Archive, TarSample
from dreamllm.data.pairs import IMAGE_SUFFIXES, Pair, PairSource, checked_caption
from dreamllm.data.problems import BadSampleError
from dreamllm.data.records import parse_json
from dreamllm.data.tar_scan import Damage, Member

DEFAULT_CAPTION_KEY = "caption"


class TarPairs(PairSource):
    """Pairs in webdataset tars: `<key>.jpg|jpeg|png|webp` and `<key>.txt`, or `<key>.json`.

    The caption is the `.txt` member, or the `.json` member's `json_caption_key`; when that is not given, `"caption"` of
    the `.json` member serves samples without a `.txt`. Two members of the same name make their sample unusable: which
    belongs to which cannot be known. `metadata` also hands out the other fields of the `.json`.

    Where samples lie is read from the index of `root`, if there is one (`dreamllm data index`), else by walking the
    tars' headers once. A sample is then read by its offset. Order: that of the tars as given and of the first member of
    each key in them. A tar that ends early gives the samples before the break and counts the one that it cuts; a
    damaged place inside counts as one sample, and those after it are read.

    Raises `ValueError` for a file that is not a tar, `FileNotFoundError` for one that is missing.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        json_caption_key: str | None = None,
        name: str = "",
        root: Path | None = None,
        index_folder: Path | None = None,
        metadata: bool = False,
    ) -> None:
        if not tars:
            raise ValueError("no tar files were given")
        self.tars = [Path(tar) for tar in tars]
        self.json_caption_key, self.metadata = json_caption_key, metadata
        self.name = name or (self.tars[0].name if len(self.tars) == 1 else self.tars[0].parent.name)
        self._archive = Archive(self.tars, "pairs", group_pairs, root, index_folder)

    def __len__(self) -> int:
        return len(self._archive)

    def pair(self, index: int) -> Pair:
        return self._pair(index, read_picture=True)

    def outline(self, index: int) -> Pair:
        return self._pair(index, read_picture=False)

    def _pair(self, index: int, read_picture: bool) -> Pair:
        sample = self._archive.sample(index)
        sample.check()
        parts = _Parts(sample)
        parts.check()
        image, text, values = self._content(parts, read_picture)
        return Pair(image, checked_caption(text, parts.name), parts.name, values)

    def _content(self, parts: _Parts, read_picture: bool) -> tuple[bytes, str, dict[str, Any]]:
        """Picture, caption and the fields of the JSON, if they are needed. The tar is opened once."""
        key = self.json_caption_key
        plain = parts.text if key is None else None
        if plain is None and parts.json is None:
            wanted = f"{parts.key}.txt" if key is None else f"{parts.key}.json"
            raise BadSampleError("missing_caption", f"{parts.name} has no caption {wanted}")
        described = parts.json if plain is None or self.metadata else None
        picture = parts.image if read_picture else None
        members = [member for member in (picture, plain, described) if member is not None]
        data = dict(zip(members, parts.sample.read(members, parts.name), strict=True))
        image = b"" if picture is None else data[picture]
        values: Any = {}
        if described is not None:
            values = parse_json(data[described], f"the JSON of {parts.name}")
            values = values if isinstance(values, dict) else {}
        if plain is not None:
            return image, _text(data[plain], parts.name), values
        caption = values.get(key or DEFAULT_CAPTION_KEY)
        if not isinstance(caption, str):
            found = key or DEFAULT_CAPTION_KEY
            raise BadSampleError("missing_caption", f"the JSON of {parts.name} has no text under {found!r}")
        return image, caption, values


class _Parts:
    """The members of a sample by their role."""

    def __init__(self, sample: TarSample) -> None:
        self.sample = sample
        self.key = _key(sample.members[0].name).decode("utf-8", "backslashreplace")
        self.name = f"{sample.tar.name}:{self.key}"
        self.image: Member | None = None
        self.text: Member | None = None
        self.json: Member | None = None
        for member in sample.members:
            suffix = _suffix(member.name)
            if suffix == ".txt":
                self.text = member
            elif suffix == ".json":
                self.json = member
            else:
                self.image = self.image or member

    def check(self) -> None:
        names = [member.name.lower() for member in self.sample.members]
        if len(set(names)) != len(names):
            raise BadSampleError("duplicate_key", f"{self.name} stands twice in its tar")
        if self.image is None:
            raise BadSampleError("missing_image", f"{self.name} has no picture ({', '.join(IMAGE_SUFFIXES)})")
        if not self.image.size:
            raise BadSampleError("corrupt_image", f"the picture of {self.name} is empty (0 bytes)")


def group_pairs(members: Iterable[Member | Damage]) -> list[list[Member]]:
    """Members with the same path up to the first dot of the file's name; only pictures and captions."""
    samples: dict[bytes, list[Member]] = {}
    for member in members:
        if isinstance(member, Damage):
            samples[b"\0%d" % member.offset] = [Member(b"", member.offset, member.size)]
        elif _suffix(member.name) in (*IMAGE_SUFFIXES, ".txt", ".json") and (key := _key(member.name)):
            samples.setdefault(key, []).append(member)
    return list(samples.values())


def _key(name: bytes) -> bytes:
    folder, file = os.path.split(name)
    stem = file.partition(b".")[0]
    return os.path.join(folder, stem) if stem else b""


def _suffix(name: bytes) -> str:
    return "." + os.path.basename(name).partition(b".")[2].decode("utf-8", "replace").lower()


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("malformed", f"the caption of {name} is not UTF-8: {error}") from error
