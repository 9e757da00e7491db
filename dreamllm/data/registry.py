"""The kinds of data by name, with typed options: how configurations, recipes and commands name a reader."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from dreamllm.data.arrow import ArrowPairs
from dreamllm.data.conversations import Conversations
from dreamllm.data.filters import Filters
from dreamllm.data.interleaved import Instructions, Interleaved, TarInterleaved
from dreamllm.data.locate import existing, find_json, find_lines, find_tars, unknown
from dreamllm.data.mixture import Part
from dreamllm.data.pairs import FilteredPairs, FolderPairs, PairMode, Pairs, PairSource
from dreamllm.data.reader import Reader
from dreamllm.data.recognise import LOOKED_FOR, parquet_hint, recognise
from dreamllm.data.tars import TarPairs
from dreamllm.documents import chat_template

InterleavedMode = Literal["joint", "comprehension", "creation"]

_NONE = Filters()


def pair_tars(
    path: Path,
    mode: PairMode = "both",
    json_caption_key: str | None = None,
    filters: Filters = _NONE,
    seed: int = 0,
    name: str = "",
    index_folder: Path | None = None,
) -> Reader:
    """Image-text pairs in webdataset tars: a tar, a folder of tars, or a JSON list of tars.

    Args:
        mode: comprehension (read the picture), creation (draw it) or both in turn.
        json_caption_key: key of the caption in the .json members; by default the .txt member, else "caption".
        filters: what to leave out.
        seed: decides the direction of each pair when the mode is both.
        name: how messages call this data.
        index_folder: where the index lies, if not beside the data or in the user's cache.
    """
    metadata = _needs_metadata(filters)
    source = TarPairs(find_tars(path), json_caption_key, name or path.name, path, index_folder, metadata)
    return Pairs(filtered(source, filters), mode, seed)


def pair_folder(path: Path, mode: PairMode = "both", filters: Filters = _NONE, seed: int = 0, name: str = "") -> Reader:
    """Image-text pairs in a folder: captions.jsonl or metadata.jsonl, or pictures beside .txt files."""
    return Pairs(filtered(FolderPairs(_folder(path), name), filters), mode, seed)


def arrow(
    path: Path,
    mode: PairMode = "both",
    caption_column: str | None = None,
    image_column: str | None = None,
    split: str | None = None,
    filters: Filters = _NONE,
    seed: int = 0,
    name: str = "",
) -> Reader:
    """Image-text pairs in a Hugging Face dataset saved with save_to_disk."""
    metadata = _needs_metadata(filters)
    source = ArrowPairs(_folder(path), caption_column, image_column, split, name, metadata)
    return Pairs(filtered(source, filters), mode, seed)


def interleaved_tars(
    path: Path,
    mode: InterleavedMode = "joint",
    filters: Filters = _NONE,
    name: str = "",
    index_folder: Path | None = None,
) -> Reader:
    """Interleaved documents in tars, each JSON followed by its pictures: a tar, a folder or a JSON list of tars."""
    return TarInterleaved(find_tars(path), mode, name or path.name, filters, path, index_folder)


def interleaved_lines(
    path: Path, images: Path | None = None, mode: InterleavedMode = "joint", filters: Filters = _NONE, name: str = ""
) -> Reader:
    """MMC4 as distributed: JSON lines (a file, or a folder of .jsonl files) and a folder of pictures."""
    return Interleaved(find_lines(path), images, mode, name, filters)


def instructions(
    path: Path,
    images: Path | None = None,
    mode: InterleavedMode = "joint",
    template: str = "vicuna_v1.1",
    filters: Filters = _NONE,
    name: str = "",
) -> Reader:
    """Instructions answered by interleaved documents: a JSON list with instruction, text_list and image_info."""
    return Instructions(find_json(path, '"instruction"'), chat_template(template), images, mode, name, filters)


def conversations(
    path: Path,
    images: Path | None = None,
    template: str = "vicuna_v1.1",
    learn_dream: bool = False,
    filters: Filters = _NONE,
    name: str = "",
) -> Reader:
    """Conversations in LLaVA's JSON, old or new form."""
    file = find_json(path, '"conversations"')
    return Conversations(file, chat_template(template), images, learn_dream, name, filters)


KINDS: dict[str, Callable[..., Reader]] = {
    function.__name__: function
    for function in (
        pair_tars,
        pair_folder,
        arrow,
        interleaved_tars,
        interleaved_lines,
        instructions,
        conversations,
    )
}
"""Name of a kind -> what opens a path as that kind. Their keyword parameters are the options of the kind."""


def make_reader(kind: str, path: str | Path, **options: Any) -> Reader:
    """Opens `path` as data of `kind`, one of `KINDS`, with the kind's options.

    The kind "auto" stands for whatever `path` holds. Options may be given as they stand in YAML: texts for paths, lists
    for tuples, mappings for `filters`. Raises `ValueError` for an unknown kind or option, or a value of the wrong type;
    `FileNotFoundError`; and what the reader itself raises.
    """
    path = existing(path)
    kind = recognised(path) if kind == "auto" else known_kind(kind)
    return KINDS[kind](path, **checked_options(kind, options))


def make_part(
    kind: str, path: str | Path, size: int | str | None = None, weight: float | None = None, **options: Any
) -> Part:
    """A part of a mixture: `make_reader(kind, path, **options)` with its virtual size or weight (see `Part`)."""
    return Part(make_reader(kind, path, **options), size, weight)


def recognised(path: Path) -> str:
    """The kind of data at `path`. Raises `UnknownDataError` saying what was looked for and found."""
    kind = recognise(path)
    if kind is None:
        raise unknown(path, LOOKED_FOR, parquet_hint(path))
    return kind


def known_kind(kind: str) -> str:
    """`kind`. Raises `ValueError` when it is none of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of data {kind!r}.{_suggestion(kind, KINDS)} Known are auto, {', '.join(KINDS)}")
    return kind


def checked_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, converted to their types. Raises `ValueError` for unknown and unfitting ones."""
    parser, names = _parser(kind)
    for name in options:
        if name not in names:
            raise ValueError(
                f"data of kind {kind} has no option {name!r}.{_suggestion(name, names)} Its options: {', '.join(names)}"
            )
    plain = {name: _plain(value) for name, value in options.items()}
    try:
        values = parser.instantiate(parser.parse_object(plain))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"data of kind {kind}: {error}") from error
    return {name: values[name] for name in options}


@cache
def _parser(kind: str) -> tuple[ArgumentParser, tuple[str, ...]]:
    function = KINDS[kind]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, skip={"path"})
    return parser, tuple(name for name in inspect.signature(function).parameters if name != "path")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(item) for name, item in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _suggestion(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def filtered(source: PairSource, filters: Filters) -> PairSource:
    """`source`, with `filters` if they leave anything out."""
    return source if filters == _NONE else FilteredPairs(source, filters)


def _needs_metadata(filters: Filters) -> bool:
    return bool(filters.languages or filters.blacklist)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is needed for this kind of data")
    return path
