"""Interleaved documents: MMC4's JSON lines beside a folder of pictures, tars of documents, instructions (spec C.4)."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamllm.data.archive import Archive, TarSample
from dreamllm.data.filters import Filters, Screen
from dreamllm.data.pairs import IMAGE_SUFFIXES, valid_text
from dreamllm.data.problems import BadSampleError, FilteredSampleError
from dreamllm.data.reader import Reader
from dreamllm.data.records import JsonRecords, parse_json
from dreamllm.data.tar_scan import Damage, Member
from dreamllm.documents import ChatTemplate, Document, PictureSource, instruction_interleaved, interleaved
from dreamllm.documents.formats import Mode

FindPicture = Callable[[str], PictureSource | None]
"""`image_name` -> the picture, or None when it is not there."""


@dataclass(frozen=True)
class PlacedPicture:
    """A picture with the text that it follows and its entry in `image_info`."""

    index: int
    info: dict[str, Any]
    source: PictureSource


@dataclass(frozen=True)
class Content:
    """An interleaved document before it is arranged: its JSON, texts, usable pictures, and what was left out."""

    values: dict[str, Any]
    texts: list[str]
    pictures: list[PlacedPicture]
    name: str
    remarks: list[tuple[str, str]]


class InterleavedReader(Reader):
    """What interleaved documents have in common: their JSON, and what is done about pictures.

    The JSON needs `text_list` (strings) and `image_info`, each with `image_name`, `matched_text_index` and optionally
    `matched_sim`. With a `template` it also needs `instruction`, and the document answers it. A picture that is missing
    costs the document that picture only, and one that `filters` leave out as well; the document's remarks say so.
    """

    def __init__(
        self, name: str, mode: Mode = "joint", filters: Filters | None = None, template: ChatTemplate | None = None
    ) -> None:
        if mode not in ("joint", "comprehension", "creation"):
            raise ValueError(f"mode must be 'joint', 'comprehension' or 'creation', not {mode!r}")
        self.name, self.mode, self.template = name, mode, template
        self.filters = filters or Filters()
        self._screen = Screen(self.filters)

    @abstractmethod
    def values(self, index: int, read_pictures: bool = True) -> tuple[Any, FindPicture, str]:
        """The JSON of document `index`, how to find its pictures, and its name. Raises `BadSampleError`.

        Without `read_pictures`, what is found may be of no content.
        """

    def document(self, index: int, epoch: int = 0) -> Document:
        return self._document(self.content(index))

    def outline(self, index: int, epoch: int = 0) -> Document:
        return self._document(self.content(index, read_pictures=self._screen.needs_pictures))

    def _document(self, content: Content) -> Document:
        placed = [(picture.index, picture.source) for picture in content.pictures]
        if self.template is None:
            made = interleaved(content.texts, placed, self.mode, content.name)
        else:
            instruction = content.values.get("instruction")
            if not isinstance(instruction, str) or not instruction.strip():
                raise BadSampleError("malformed", f"{content.name} has no instruction")
            text = valid_text(instruction.strip(), content.name)
            made = instruction_interleaved(text, content.texts, placed, self.template, self.mode, content.name)
        return Document(made.parts, made.overflow, made.name, tuple(content.remarks))

    def content(self, index: int, read_pictures: bool = True) -> Content:
        """The checked content of document `index`, before a mode is chosen. Raises `BadSampleError`."""
        values, find, name = self.values(index, read_pictures)
        if not isinstance(values, dict):
            raise BadSampleError("malformed", f"{name} is not a JSON object")
        try:
            content = self._content(values, find, name)
        except BadSampleError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise BadSampleError("malformed", f"{name}: {type(error).__name__}: {error}") from error
        self._screen.check_count(len(content.pictures), name)
        if not content.pictures and not any(text.strip() for text in content.texts):
            raise BadSampleError("empty_caption", f"{name} has neither text nor pictures")
        return content

    def _content(self, values: dict[str, Any], find: FindPicture, name: str) -> Content:
        texts = [_string(text, name) for text in values["text_list"]]
        self._screen.check_text(" ".join(texts), name)
        self._screen.check_metadata(values, name)
        self._screen.check_listed((name, name.rpartition(":")[2]), name)
        content = Content(values, texts, [], name, [])
        for info in values.get("image_info") or []:
            index = int(info["matched_text_index"])
            if not 0 <= index < len(texts):
                raise ValueError(f"a picture is matched with text {index}, but there are only {len(texts)} texts")
            source = self._picture(info, find, name, content.remarks)
            if source is not None:
                content.pictures.append(PlacedPicture(index, info, source))
        return content

    def _picture(
        self, info: dict[str, Any], find: FindPicture, name: str, remarks: list[tuple[str, str]]
    ) -> PictureSource | None:
        """The picture of one entry of `image_info`, or None with a remark."""
        image_name = _string(info["image_name"], name)
        label = f"{name}, picture {image_name}"
        try:
            self._screen.check_similarity(info.get("matched_sim"), label)
            self._screen.check_listed((image_name,), label)
            self._screen.check_urls(info, label)
            source = find(image_name)
            if source is None:
                remarks.append(("lost_picture", f"{label} does not exist"))
                return None
            self._screen.check_picture(source, label)
        except FilteredSampleError as error:
            remarks.append(("filtered_picture", str(error)))
            return None
        return source

    def describe(self) -> dict[str, Any]:
        values = {**super().describe(), "mode": self.mode}
        if self.template is not None:
            values["template"] = self.template.name
        if filters := self.filters.describe():
            values["filters"] = filters
        return values


class Interleaved(InterleavedReader):
    """MMC4 as distributed: one document per line of one or more `.jsonl` files, pictures in a folder.

    `images` is the folder of the pictures (default: `images` beside the file, else the file's own folder).
    """

    def __init__(
        self,
        path: Path | Sequence[Path],
        images: Path | None = None,
        mode: Mode = "joint",
        name: str = "",
        filters: Filters | None = None,
    ) -> None:
        paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(p) for p in path]
        super().__init__(name or (paths[0].stem if len(paths) == 1 else paths[0].parent.name), mode, filters)
        self.path = paths[0]
        self.images = picture_folder(paths[0], images)
        self._records = JsonRecords(paths)

    def __len__(self) -> int:
        return len(self._records)

    def values(self, index: int, read_pictures: bool = True) -> tuple[Any, FindPicture, str]:
        values, name = self._records.record(index)
        return values, self._find, name

    def _find(self, image_name: str) -> PictureSource | None:
        path = self.images / image_name
        return path if path.is_file() else None


class Instructions(Interleaved):
    """Instructions (`instruction`) answered by interleaved documents: InstructMMC4, spec B.4.

    `path` is a JSON list, or JSON lines; `images` the folder of the pictures.
    """

    def __init__(
        self,
        path: Path | Sequence[Path],
        template: ChatTemplate,
        images: Path | None = None,
        mode: Mode = "joint",
        name: str = "",
        filters: Filters | None = None,
    ) -> None:
        super().__init__(path, images, mode, name, filters)
        self.template = template


class TarInterleaved(InterleavedReader):
    """Interleaved documents in tars: `<docid>.json`, followed by its pictures `<docid>-<imagestem>.jpg` (spec C.4).

    Everything after a JSON, up to the next one, belongs to it. `image_name` is looked up, ignoring case, among its
    members by the whole name, by the name up to its last and up to its first dot, and by what follows the last hyphen
    (as newer tars are named); a shorter form that fits several members counts for none. Random access as in `TarPairs`.

    Raises `ValueError` for a file that is not a tar, `FileNotFoundError` for one that is missing.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        mode: Mode = "joint",
        name: str = "",
        filters: Filters | None = None,
        root: Path | None = None,
        index_folder: Path | None = None,
    ) -> None:
        if not tars:
            raise ValueError("no tar files were given")
        self.tars = [Path(tar) for tar in tars]
        super().__init__(
            name or (self.tars[0].name if len(self.tars) == 1 else self.tars[0].parent.name), mode, filters
        )
        self._archive = Archive(self.tars, "interleaved", group_documents, root, index_folder)

    def __len__(self) -> int:
        return len(self._archive)

    def values(self, index: int, read_pictures: bool = True) -> tuple[Any, FindPicture, str]:
        sample = self._archive.sample(index)
        sample.check()
        head, *members = sample.members
        docid = os.path.basename(head.name)[: -len(".json")].decode("utf-8", "backslashreplace")
        name = f"{sample.tar.name}:{docid}"
        if not head.name.lower().endswith(b".json"):
            raise BadSampleError("malformed", f"{name}: the tar has pictures before its first JSON")
        if head.size == 0:
            raise BadSampleError("malformed", f"the JSON of {name} is empty (0 bytes)")
        values = parse_json(sample.read([head], name)[0], f"the JSON of {name}")
        pictures = _Pictures(sample, docid, members, name)
        return values, pictures.find if read_pictures else pictures.outline, name


class _Pictures:
    """The picture members of a document, by every form of their names."""

    def __init__(self, sample: TarSample, docid: str, members: Sequence[Member], name: str) -> None:
        self.sample, self.name = sample, name
        self.forms: list[dict[str, Member | None]] = [{} for _ in range(4)]
        for member in members:
            file = os.path.basename(member.name).decode("utf-8", "backslashreplace")
            for table, form in zip(self.forms, name_forms(file.removeprefix(f"{docid}-")), strict=True):
                table[form] = None if form in table else member

    def find(self, image_name: str) -> bytes | None:
        member = self._member(image_name)
        return None if member is None else self.sample.read([member], self.name)[0]

    def outline(self, image_name: str) -> bytes | None:
        return None if self._member(image_name) is None else b""

    def _member(self, image_name: str) -> Member | None:
        forms = zip(self.forms, name_forms(os.path.basename(image_name)), strict=True)
        return next((member for table, form in forms if (member := table.get(form)) is not None), None)


def name_forms(file: str) -> tuple[str, str, str, str]:
    """The name, up to its last dot, up to its first dot, and of the latter what follows the last hyphen; lower case."""
    file = file.lower()
    first = file.partition(".")[0]
    return file, file.rpartition(".")[0] or file, first, first.rpartition("-")[2]


def group_documents(members: Iterable[Member | Damage]) -> list[list[Member]]:
    """Each JSON with the pictures after it. Pictures before the first JSON make one sample, which cannot be used."""
    documents: list[list[Member]] = []
    known = False
    for member in members:
        if isinstance(member, Damage):
            documents.append([Member(b"", member.offset, member.size)])
            known = False  # the JSON of what follows may have been lost
            continue
        suffix = os.path.splitext(member.name)[1].lower().decode("utf-8", "replace")
        if os.path.basename(member.name).startswith(b"."):
            continue
        if suffix == ".json":
            documents.append([member])
            known = True
        elif suffix in IMAGE_SUFFIXES:
            if known:
                documents[-1].append(member)
            elif not documents:
                documents.append([member])
    return documents


def picture_folder(path: Path, images: Path | None) -> Path:
    """`images`, or the folder `images` beside `path`, or that of `path`. Raises `FileNotFoundError`."""
    beside = path.parent / "images"
    folder = Path(images) if images else beside if beside.is_dir() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"picture folder {folder} of {path} does not exist")
    return folder


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text was expected, not {value!r}")
    return valid_text(value, name)
