"""Opening a path whose kind of data is recognised by what it holds."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from dreamllm.data.conversations import Conversations
from dreamllm.data.interleaved import Interleaved
from dreamllm.data.pairs import CAPTION_FILES, IMAGE_SUFFIXES, FolderPairs, PairMode, Pairs, PairSource
from dreamllm.data.reader import Reader
from dreamllm.data.tars import TarPairs
from dreamllm.documents import VICUNA_V1_1, ChatTemplate

LOOKED_FOR = (
    "*.tar (webdataset image-text pairs)",
    f"{' or '.join(CAPTION_FILES)} with file_name and text (pairs)",
    "*.jsonl with text_list and image_info (interleaved documents)",
    "*.json, a list with conversations (LLaVA)",
    f"pictures ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name (pairs)",
)


class UnknownDataError(ValueError):
    """A path that holds no data of a known kind. The message says what was looked for and what was found."""


def open_data(path: str | Path, mode: PairMode = "both", seed: int = 0, template: ChatTemplate = VICUNA_V1_1) -> Reader:
    """Opens whatever `path`, a folder or a file, holds. See `LOOKED_FOR` for the kinds, tried in this order.

    `mode` is for pairs and interleaved documents ("both": pairs in turn, interleaved jointly), `seed` for what pairs
    draw, `template` for conversations. Raises `FileNotFoundError` or `UnknownDataError`.
    """
    path = existing(path)
    source = find_pairs(path)
    if source is not None:
        return Pairs(source, mode, seed)
    lines = _files(path, ".jsonl", '"text_list"')
    if lines:
        return Interleaved(_only(lines, path), mode="joint" if mode == "both" else mode)
    dialogues = _files(path, ".json", '"conversations"')
    if dialogues:
        return Conversations(_only(dialogues, path), template)
    raise _unknown(path, LOOKED_FOR)


def open_pairs(path: str | Path) -> PairSource:
    """Opens `path` as image-text pairs. Raises `FileNotFoundError` or `UnknownDataError`."""
    path = existing(path)
    source = find_pairs(path)
    if source is None:
        raise _unknown(path, (LOOKED_FOR[0], LOOKED_FOR[1], LOOKED_FOR[4]))
    return source


def existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data {path} does not exist")
    return path


def find_pairs(path: Path) -> PairSource | None:
    """The image-text pairs that `path` holds, or None."""
    tars = [path] if path.suffix == ".tar" else sorted(path.rglob("*.tar"))
    if tars:
        return TarPairs(tars, name=path.name)
    if not path.is_dir():
        return None
    if any((path / file).is_file() for file in CAPTION_FILES):
        return FolderPairs(path)
    return FolderPairs(path) if _has_a_pair(path) else None


def _has_a_pair(root: Path) -> bool:
    for folder, _, files in os.walk(root):
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(os.path.join(folder, f"{stem}.txt")):
                return True
    return False


def _files(path: Path, suffix: str, key: str) -> list[Path]:
    """The files with `suffix` in whose first 64 KiB `key` stands."""
    candidates = [path] if path.is_file() else sorted(path.glob(f"*{suffix}"))
    return [file for file in candidates if file.suffix == suffix and key in _beginning(file)]


def _beginning(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(1 << 16)


def _only(files: list[Path], path: Path) -> Path:
    if len(files) > 1:
        raise UnknownDataError(
            f"{path} holds several data files ({', '.join(f.name for f in files)}); name one of them"
        )
    return files[0]


def _unknown(path: Path, looked_for: tuple[str, ...]) -> UnknownDataError:
    wanted = "\n".join(f"  - {kind}" for kind in looked_for)
    return UnknownDataError(f"{path} holds no data of a known kind. Looked for\n{wanted}\nand found {_found(path)}")


def _found(path: Path) -> str:
    if path.is_file():
        return f"one file of {path.stat().st_size} bytes, beginning {json.dumps(_beginning(path)[:40])}"
    counts = Counter(file.suffix.lower() or "(no suffix)" for file in path.rglob("*") if file.is_file())
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(8)) or "an empty folder"
