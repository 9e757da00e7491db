"""Image-text pairs in a Hugging Face dataset saved with `save_to_disk`: Arrow files, mapped into memory."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm.data.pairs import Pair, PairSource, checked_caption
from dreamllm.data.problems import BadSampleError
from dreamllm.data.records import stamp
from dreamllm.documents import PictureSource

try:
    import pyarrow
    import pyarrow.types
except ImportError:  # the extra "arrow" is not installed; said when it is needed
    pyarrow = None

INFO_FILE, STATE_FILE, SPLITS_FILE = "dataset_info.json", "state.json", "dataset_dict.json"
CAPTION_COLUMNS = ("text", "caption", "prompt")
IMAGE_COLUMNS = ("image", "jpg", "png")
_FILE_MAGIC = b"ARROW1"


class ArrowPairs(PairSource):
    """The rows of a folder written by `Dataset.save_to_disk`: `dataset_info.json`, `state.json`, `*.arrow`.

    The picture column is a struct of `bytes` and `path`, or bytes, or a path (relative to the folder). Of a folder of
    splits (`DatasetDict`), `split` is opened, by default "train" or the only one. The files are mapped into memory by
    each process when it first reads.

    Raises `ImportError` without pyarrow, and `ValueError` for a folder of another layout or a column that is missing or
    of another type.
    """

    def __init__(
        self,
        root: Path,
        caption_column: str | None = None,
        image_column: str | None = None,
        split: str | None = None,
        name: str = "",
        metadata: bool = False,
    ) -> None:
        _require_pyarrow(root)
        self.root = _split_folder(root, split)
        self.name, self.metadata = name or root.name, metadata
        self.files = _data_files(self.root)
        self._stamps = [stamp(file) for file in self.files]
        self._opened: list[Any] | None = None
        batches = self._batches()
        schema = _common_schema(self.files, batches)
        self._ends: list[int] = np.cumsum([0, *(batch.num_rows for batch in batches)])[1:].tolist()
        self.caption_column = _column(schema, caption_column, CAPTION_COLUMNS, _is_text, "caption", self.root)
        self.image_column = _column(schema, image_column, IMAGE_COLUMNS, _is_picture, "image", self.root)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def pair(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside [0, {len(self)})")
        name = f"{self.name} row {index}"
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches()[number]
        row = index - (self._ends[number - 1] if number else 0)
        try:
            caption = batch.column(self.caption_column)[row].as_py()
            picture = self._picture(batch.column(self.image_column)[row].as_py(), name)
            others = self._others(batch, row) if self.metadata else {}
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise BadSampleError("malformed", f"{name} cannot be read: {error}") from error
        if caption is None:
            raise BadSampleError("missing_caption", f"{name} has no {self.caption_column}")
        return Pair(picture, checked_caption(caption, name), name, others)

    def _picture(self, value: Any, name: str) -> PictureSource:
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise BadSampleError("missing_image", f"{name} has no picture")
        if not value:
            raise BadSampleError("corrupt_image", f"the picture of {name} is empty (0 bytes)")
        if isinstance(value, bytes):
            return value
        path = self.root / value
        if not path.is_file():
            raise BadSampleError("missing_image", f"{name}: picture {path} does not exist")
        return path

    def _others(self, batch: Any, row: int) -> dict[str, Any]:
        names = [n for n in batch.schema.names if n not in (self.caption_column, self.image_column)]
        return {n: batch.column(n)[row].as_py() for n in names}

    def _batches(self) -> list[Any]:
        """The record batches of all files; their buffers point into the mapped files."""
        if self._opened is None:
            self._opened = [
                batch
                for file, then in zip(self.files, self._stamps, strict=True)
                for batch in _read_batches(file, then)
            ]
        return self._opened

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "caption_column": self.caption_column, "image_column": self.image_column}


def is_arrow_folder(path: Path) -> bool:
    """Whether a folder looks as `save_to_disk` leaves it, with or without splits."""
    return (path / SPLITS_FILE).is_file() or (path / STATE_FILE).is_file()


def _require_pyarrow(root: Path) -> None:
    if pyarrow is None:
        raise ImportError(f"{root} holds Arrow files, which need pyarrow: pip install 'dreamkernels[arrow]'")


def _split_folder(root: Path, split: str | None) -> Path:
    if not (root / SPLITS_FILE).is_file():
        if split is not None:
            raise ValueError(f"{root} has no splits ({SPLITS_FILE}), so split={split!r} cannot be opened")
        return root
    splits = _json(root / SPLITS_FILE).get("splits")
    if not isinstance(splits, list) or not splits:
        raise ValueError(f"{root / SPLITS_FILE} names no splits")
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        raise ValueError(f"{root} has the splits {', '.join(map(str, splits))}, not {wanted!r}; choose one with split")
    return root / wanted


def _data_files(root: Path) -> list[Path]:
    missing = [name for name in (INFO_FILE, STATE_FILE) if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root} was not written by save_to_disk: it has no {' and no '.join(missing)}")
    state = _json(root / STATE_FILE)
    if state.get("_indices_data_files"):
        raise ValueError(f"{root} is a selection of another dataset; write it again with flatten_indices()")
    try:
        files = [root / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{root / STATE_FILE} does not list _data_files with a filename each") from error
    for file in files:
        if not file.is_file():
            raise ValueError(f"{root / STATE_FILE} names {file.name}, which does not exist; the folder is not whole")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def _read_batches(file: Path, then: tuple[int, int]) -> list[Any]:
    if stamp(file) != then:
        raise ValueError(f"{file} was changed after it was opened; start again")
    source = pyarrow.memory_map(str(file))
    try:
        if source.read(len(_FILE_MAGIC)) == _FILE_MAGIC:
            reader = pyarrow.ipc.open_file(source)
            return [reader.get_batch(i) for i in range(reader.num_record_batches)]
        source.seek(0)
        return list(pyarrow.ipc.open_stream(source))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a whole Arrow file: {error}") from error


def _common_schema(files: Sequence[Path], batches: Sequence[Any]) -> Any:
    if not batches:
        raise ValueError(f"{files[0].parent if files else 'the dataset'} has no rows")
    first = batches[0].schema
    if any(not batch.schema.equals(first) for batch in batches):
        raise ValueError(f"the Arrow files of {files[0].parent} have different columns")
    return first


def _column(schema: Any, given: str | None, usual: Sequence[str], fits: Any, what: str, root: Path) -> str:
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    candidates = [given] if given else [name for name in usual if name in schema.names]
    if not candidates or candidates[0] not in schema.names:
        wanted = repr(given) if given else " or ".join(usual)
        raise ValueError(f"{root} has no {what} column {wanted}; it has {found}. Choose one with {what}_column")
    if not fits(schema.field(candidates[0]).type):
        raise ValueError(f"{root}: column {candidates[0]!r} is no {what} column; the columns are {found}")
    return candidates[0]


def _is_text(kind: Any) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _is_picture(kind: Any) -> bool:
    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return _is_text(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
