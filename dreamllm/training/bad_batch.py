"""The file of a step whose loss was not finite: its packed batches, to be looked at and run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dreamllm.documents import PackedBatch
from dreamllm.training.errors import NonFiniteLossError
from dreamllm.training.step import shown


def store_batches(path: Path, where: str, about: dict[str, Any], batches: Sequence[PackedBatch]) -> str:
    """Writes them with the values `about` the step; returns how many documents they hold, and the first names.

    Raises `NonFiniteLossError`, beginning with `where`, when the file cannot be written.
    """
    names = [name for batch in batches for name in batch.names]
    try:
        torch.save({**about, "batches": [_plain(batch) for batch in batches]}, path)
    except (OSError, RuntimeError) as error:
        raise NonFiniteLossError(f"{where}; its batch ({shown(names)}) could not be saved: {error}") from error
    return f"{len(names)} documents ({shown(names)})"


def _plain(batch: PackedBatch) -> dict[str, Any]:
    """A batch as a dictionary that `torch.load(weights_only=True)` reads."""
    return {f.name: getattr(batch, f.name) for f in fields(batch)}


def load_stored_batch(path: str | Path) -> tuple[dict[str, Any], list[PackedBatch]]:
    """Reads the file of a batch whose loss was not finite: (step, stage, losses), and its packed batches."""
    stored = torch.load(path, weights_only=True)
    batches = [PackedBatch(**{**values, "names": tuple(values["names"])}) for values in stored.pop("batches")]
    return stored, [batch.to("cpu") for batch in batches]
