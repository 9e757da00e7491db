"""Captioned pictures on disk, in the forms in which data arrives."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from tests.tiny import random_picture


def png(seed: int, size: int = 16) -> bytes:
    file = io.BytesIO()
    random_picture(seed, size).save(file, "PNG")
    return file.getvalue()


def write_pairs(folder: Path, count: int, caption: str = "picture number {}") -> Path:
    """`0.png` beside `0.txt` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(caption.format(i))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_jsonl(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
