"""Opening a path whose kind of data is recognised by what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamllm.data.arrow import ArrowPairs
from dreamllm.data.locate import UnknownDataError, existing, find_tars, unknown
from dreamllm.data.pairs import FolderPairs, PairMode, PairSource
from dreamllm.data.reader import Reader
from dreamllm.data.recognise import LOOKED_FOR, parquet_hint, recognise
from dreamllm.data.registry import make_reader, recognised
from dreamllm.data.tars import TarPairs
from dreamllm.documents import VICUNA_V1_1, ChatTemplate

__all__ = ["UnknownDataError", "existing", "find_pairs", "open_data", "open_pairs"]

_PAIR_KINDS = ("pair_tars", "arrow", "pair_folder")


def open_data(
    path: str | Path, mode: PairMode = "both", seed: int = 0, template: ChatTemplate = VICUNA_V1_1, **options: Any
) -> Reader:
    """Opens whatever `path`, a folder or a file, holds. See `LOOKED_FOR` for the kinds, tried in this order.

    `mode` is for pairs and interleaved documents ("both": pairs in turn, interleaved jointly), `seed` for what pairs
    draw, `template` for conversations and instructions. `options` are those of the kind (see `registry.KINDS`). Raises
    `FileNotFoundError`, `UnknownDataError`, and what `make_reader` raises.
    """
    path = existing(path)
    kind = recognised(path)
    if kind in _PAIR_KINDS:
        options |= {"mode": mode, "seed": seed}
    elif kind != "conversations":
        options["mode"] = "joint" if mode == "both" else mode
    if kind in ("conversations", "instructions"):
        options["template"] = template.name
    return make_reader(kind, path, **options)


def open_pairs(path: str | Path) -> PairSource:
    """Opens `path` as image-text pairs. Raises `FileNotFoundError` or `UnknownDataError`."""
    path = existing(path)
    source = find_pairs(path)
    if source is None:
        raise unknown(path, tuple(LOOKED_FOR[i] for i in (0, 1, 2, 6)), parquet_hint(path))
    return source


def find_pairs(path: Path) -> PairSource | None:
    """The image-text pairs that `path` holds, or None."""
    kind = recognise(path)
    if kind == "pair_tars":
        return TarPairs(find_tars(path), name=path.name, root=path)
    if kind == "arrow":
        return ArrowPairs(path)
    return FolderPairs(path) if kind == "pair_folder" else None
