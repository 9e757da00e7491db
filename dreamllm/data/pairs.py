"""Image-text pairs: where they lie (a folder, tars) and what documents are made of them."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dreamllm.data.filters import Filters, Screen
from dreamllm.data.problems import BadSampleError
from dreamllm.data.reader import Reader
from dreamllm.data.seeds import derive_seed, uniform
from dreamllm.documents import ChatTemplate, Document, PictureSource, conversation, pair

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")

PairMode = Literal["comprehension", "creation", "both"]


@dataclass(frozen=True)
class Pair:
    """A picture (not decoded), its caption (stripped, not empty), a name for messages, and what else is known of it."""

    image: PictureSource
    caption: str
    name: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class PairSource(ABC):
    """A randomly accessible collection of image-text pairs."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pair(self, index: int) -> Pair:
        """Raises `BadSampleError` when picture or caption is missing or the caption is empty or unreadable."""

    def outline(self, index: int) -> Pair:
        """`pair(index)`, whose picture may be of no content where reading it would cost something."""
        return self.pair(index)

    def describe(self) -> dict[str, Any]:
        """What identifies the source in a run's stored configuration, as JSON values."""
        return {"source": type(self).__name__}

    def usable(self) -> Iterator[Pair]:
        """The pairs whose picture file and caption are there, in order. Pictures are not decoded."""
        return filter(None, map(self.usable_pair, range(len(self))))

    def usable_pair(self, index: int) -> Pair | None:
        """`pair(index)`, or None when it cannot be used."""
        try:
            return self.pair(index)
        except BadSampleError:
            return None


class FolderPairs(PairSource):
    """Pairs in a plain folder, nested or not.

    Either `captions.jsonl` (or `metadata.jsonl`) with one `{"file_name": ..., "text": ...}` per line, or a picture
    `x.png|jpg|jpeg|webp` beside its caption `x.txt`. The order is that of the lines, or of the sorted paths.
    """

    def __init__(self, root: Path, name: str = "") -> None:
        self.root, self.name = root, name or root.name
        listing = next((root / file for file in CAPTION_FILES if (root / file).is_file()), None)
        self._listed = None if listing is None else listing.read_text(encoding="utf-8").splitlines()
        self._stems = _stems(root) if listing is None else []

    def __len__(self) -> int:
        return len(self._stems) if self._listed is None else len(self._listed)

    def pair(self, index: int) -> Pair:
        return self._from_files(index) if self._listed is None else self._from_line(index, self._listed[index])

    def _from_line(self, index: int, line: str) -> Pair:
        name = f"{self.name} line {index + 1}"
        try:
            values = json.loads(line)
            file_name, text = values["file_name"], values["text"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise BadSampleError("malformed", f'{name}: a JSON object with "file_name" and "text" is needed') from error
        if not isinstance(file_name, str) or not isinstance(text, str):
            raise BadSampleError("malformed", f'{name}: "file_name" and "text" must be strings')
        if not (self.root / file_name).is_file():
            raise BadSampleError("missing_image", f"{name}: picture {file_name} does not exist")
        others = {key: value for key, value in values.items() if key not in ("file_name", "text")}
        return Pair(self.root / file_name, checked_caption(text, name), f"{self.name}/{file_name}", others)

    def _from_files(self, index: int) -> Pair:
        stem, suffix, has_caption = self._stems[index]
        name = f"{self.name}/{stem}{suffix}"
        if not suffix:
            raise BadSampleError("missing_image", f"{name}.txt has no picture ({', '.join(IMAGE_SUFFIXES)}) beside it")
        if not has_caption:
            raise BadSampleError("missing_caption", f"{name} has no caption {stem}.txt beside it")
        try:
            text = (self.root / f"{stem}.txt").read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("malformed", f"the caption of {name} is not UTF-8: {error}") from error
        except FileNotFoundError as error:
            raise BadSampleError("missing_caption", f"the caption of {name} has disappeared") from error
        return Pair(self.root / f"{stem}{suffix}", checked_caption(text, name), name)


def files_below(root: Path) -> Iterator[str]:
    """The paths of all files below `root`, each folder's in the order of their names, through links to folders as well.

    A folder is walked once, by whichever path is met first, so links may form circles.
    """
    met: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in met:
            folders.clear()
            continue
        met.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (os.path.join(folder, file) for file in sorted(files))


def checked_caption(text: str, name: str) -> str:
    """The stripped caption. Raises `BadSampleError` when nothing is left, or what is left is no Unicode text."""
    if not text.strip():
        raise BadSampleError("empty_caption", f"{name} has an empty caption")
    return valid_text(text.strip(), name)


def valid_text(text: str, name: str) -> str:
    """`text`. Raises `BadSampleError` for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError("malformed", f"the text of {name} is not valid Unicode: {error}") from error
    return text


def _stems(root: Path) -> list[tuple[str, str, bool]]:
    """(path without suffix, picture suffix or "", whether there is a caption), sorted."""
    pictures: dict[str, str] = {}
    captions: set[str] = set()
    for file in files_below(root):
        stem, suffix = os.path.splitext(os.path.relpath(file, root))
        if suffix == ".txt":
            captions.add(stem)
        elif suffix.lower() in IMAGE_SUFFIXES:
            pictures.setdefault(stem, suffix)
    return [(stem, pictures.get(stem, ""), stem in captions) for stem in sorted(pictures.keys() | captions)]


class FilteredPairs(PairSource):
    """The pairs of `source` that `filters` let through; the others raise `FilteredSampleError`."""

    def __init__(self, source: PairSource, filters: Filters) -> None:
        self.source, self.filters, self.name = source, filters, source.name
        self._screen = Screen(filters)

    def __len__(self) -> int:
        return len(self.source)

    def pair(self, index: int) -> Pair:
        pair = self._check(self.source.pair(index))
        self._screen.check_picture(pair.image, pair.name)
        return pair

    def outline(self, index: int) -> Pair:
        return self.pair(index) if self._screen.needs_pictures else self._check(self.source.outline(index))

    def _check(self, pair: Pair) -> Pair:
        self._screen.check_text(pair.caption, pair.name)
        self._screen.check_metadata(pair.metadata, pair.name)
        self._screen.check_listed((pair.name, pair.name.rpartition(":")[2]), pair.name)
        return pair

    def describe(self) -> dict[str, Any]:
        return {**self.source.describe(), "filters": self.filters.describe()}


class Pairs(Reader):
    """Pairs as documents: to read the picture (comprehension), to draw it (creation), or both in turn.

    With `mode="both"` the direction of each sample is a coin drawn from (seed, epoch, index).
    """

    def __init__(self, source: PairSource, mode: PairMode = "both", seed: int = 0) -> None:
        if mode not in ("comprehension", "creation", "both"):
            raise ValueError(f"mode must be 'comprehension', 'creation' or 'both', not {mode!r}")
        self.source, self.mode, self.seed = source, mode, seed
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def document(self, index: int, epoch: int = 0) -> Document:
        return self._document(self.source.pair(index), index, epoch)

    def outline(self, index: int, epoch: int = 0) -> Document:
        return self._document(self.source.outline(index), index, epoch)

    def _document(self, sample: Pair, index: int, epoch: int) -> Document:
        return pair(sample.image, sample.caption, self.direction(index, epoch), sample.name)

    def direction(self, index: int, epoch: int) -> Literal["comprehension", "creation"]:
        if self.mode != "both":
            return self.mode
        return "comprehension" if uniform(self.seed, "mode", epoch, index) >= 0.5 else "creation"

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self.source.describe(), "mode": self.mode, "seed": self.seed}


class CaptionInstructions(Reader):
    """Instructions made from captions: a question about the picture, or a request to draw it, drawn like a pair's mode.

    `questions` are asked about the picture; `requests` hold `{caption}`. The decision to create is learned.
    """

    def __init__(
        self,
        source: PairSource,
        template: ChatTemplate,
        questions: Sequence[str] = ("What is this?",),
        requests: Sequence[str] = ("Draw: {caption}",),
        seed: int = 0,
    ) -> None:
        self.source, self.template, self.seed = source, template, seed
        self.questions, self.requests = tuple(questions), tuple(requests)
        self.name = f"{source.name} instructions"

    def __len__(self) -> int:
        return len(self.source)

    def document(self, index: int, epoch: int = 0) -> Document:
        return self._document(self.source.pair(index), index, epoch)

    def outline(self, index: int, epoch: int = 0) -> Document:
        return self._document(self.source.outline(index), index, epoch)

    def _document(self, sample: Pair, index: int, epoch: int) -> Document:
        caption = without_placeholders(sample.caption)
        choice = derive_seed(self.seed, "wording", epoch, index)
        if uniform(self.seed, "instruction", epoch, index) >= 0.5:
            question = self.questions[choice % len(self.questions)]
            turns = [("user", f"<image> {question}"), ("assistant", caption)]
        else:
            request = self.requests[choice % len(self.requests)]
            turns = [("user", request.replace("{caption}", caption)), ("assistant", "<dream>")]
        return conversation(turns, [sample.image], self.template, learn_dream=True, name=sample.name)

    def describe(self) -> dict[str, Any]:
        wording = {"questions": list(self.questions), "requests": list(self.requests), "template": self.template.name}
        return {**super().describe(), **self.source.describe(), "seed": self.seed, **wording}


def without_placeholders(caption: str) -> str:
    """The caption without strings that a conversation would take for picture slots."""
    return caption.replace("<image>", "image").replace("<dream>", "dream")
