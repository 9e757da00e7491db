"""Folders as `datasets.Dataset.save_to_disk` leaves them, written with pyarrow alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow


def write_arrow(folder: Path, table: pyarrow.Table, files: int = 1, rows_per_batch: int = 1000) -> Path:
    """`table` in `files` Arrow streams with the two JSON files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    rows = -(-table.num_rows // files)
    for i, name in enumerate(names):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(i * rows, rows), max_chunksize=rows_per_batch)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": None}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def write_splits(folder: Path, tables: dict[str, pyarrow.Table]) -> Path:
    """A `DatasetDict`."""
    for name, table in tables.items():
        write_arrow(folder / name, table)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}))
    return folder
