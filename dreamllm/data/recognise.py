"""What kind of data a path holds, by looking into it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from dreamllm.data.arrow import INFO_FILE, SPLITS_FILE, is_arrow_folder
from dreamllm.data.locate import files_with, find_tars, has_a_pair, is_tar_list
from dreamllm.data.pairs import CAPTION_FILES, IMAGE_SUFFIXES, files_below
from dreamllm.data.problems import BadSampleError
from dreamllm.data.records import parse_json
from dreamllm.data.tar_scan import Member, walk

LOOKED_FOR = (
    "*.tar (webdataset image-text pairs, or interleaved documents), or a .json list of tars",
    f"{SPLITS_FILE}, or {INFO_FILE} and *.arrow (a Hugging Face dataset saved with save_to_disk)",
    f"{' or '.join(CAPTION_FILES)} with file_name and text (pairs)",
    "*.jsonl with text_list and image_info (interleaved documents)",
    "*.json, a list with instruction and text_list (instructions)",
    "*.json, a list with conversations (LLaVA)",
    f"pictures ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name (pairs)",
)
_LOOKED_INTO = 16


def recognise(path: Path) -> str | None:
    """The kind of data that `path` holds, one of `KINDS`, or None. See `LOOKED_FOR`, tried in this order."""
    if path.suffix == ".tar" or is_tar_list(path) or any(file.endswith(".tar") for file in files_below(path)):
        return "interleaved_tars" if _hold_documents(find_tars(path)) else "pair_tars"
    if path.is_dir() and is_arrow_folder(path):
        return "arrow"
    if path.is_dir() and any((path / file).is_file() for file in CAPTION_FILES):
        return "pair_folder"
    if files_with(path, ".jsonl", '"text_list"') and not files_with(path, ".jsonl", '"instruction"'):
        return "interleaved_lines"
    for suffix in (".json", ".jsonl"):
        for key, kind in (('"instruction"', "instructions"), ('"conversations"', "conversations")):
            if files_with(path, suffix, key):
                return kind
    return "pair_folder" if path.is_dir() and has_a_pair(path) else None


def _hold_documents(tars: list[Path]) -> bool:
    """Whether interleaved documents lie in the first tar that holds anything. Raises `ValueError` if none is a tar."""
    failure: ValueError | None = None
    for tar in tars[:_LOOKED_INTO]:
        try:
            members = list(itertools.islice(walk(tar), _LOOKED_INTO))
        except ValueError as error:
            failure = failure or error
            continue
        found = [_is_document(tar, member) for member in members if isinstance(member, Member)]
        if found:
            return any(found)
    if failure is not None:
        raise failure
    return False


def _is_document(tar: Path, member: Member) -> bool:
    if not member.name.lower().endswith(b".json") or member.size > 1 << 24:
        return False
    with open(tar, "rb") as file:
        data = os.pread(file.fileno(), member.size, member.offset)
    try:
        values = parse_json(data, tar.name)
    except BadSampleError:
        return False
    return isinstance(values, dict) and "text_list" in values


def parquet_hint(path: Path) -> str:
    """What to do about Parquet files, if there are some."""
    if any(file.endswith(".parquet") for file in files_below(path)):
        return "; Parquet is not read: open it with datasets.load_dataset and write it with save_to_disk"
    return ""
