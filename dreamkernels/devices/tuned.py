"""Launch parameters that a user measured on their own GPU: one file per architecture in the user's cache folder.

A file holds one table per GPU model, so that one home folder serves several machines. Its entries stand in for the
shipped ones of the same bucket (kernel, max_width, max_length). A GPU without a table of its own uses the shipped
parameters; so does an entry of which the shipped table no longer knows the bucket or the parameters.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FORMAT = "dreamkernels launch parameters 1"
LIMITS_OF_BUCKET = ("max_width", "max_length")
NOT_PARAMETERS = (*LIMITS_OF_BUCKET, "measured")

_folder: Path | None = None
_used = True


class TunedParametersWarning(UserWarning):
    """A file of tuned launch parameters cannot be used; the shipped ones are."""


def cache_folder() -> Path:
    """Where tuned parameters are stored: what use_tuned() named, else devices/ in $DREAMKERNELS_CACHE or in the user's
    cache folder ($XDG_CACHE_HOME/dreamkernels, ~/.cache/dreamkernels)."""
    if _folder is not None:
        return _folder
    named = os.environ.get("DREAMKERNELS_CACHE")
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamkernels"
    return (Path(named) if named else general) / "devices"


def use_tuned(folder: Path | str | bool = True) -> None:
    """Chooses the launch parameters of all later calls: False, the shipped ones alone; True, also those in the user's
    cache folder, as at the start; a folder, also those in it.

    Tuned parameters may change the last bits of a result, since sums are taken in another order.
    """
    global _folder, _used
    _used = folder is not False
    _folder = None if isinstance(folder, bool) else Path(folder)
    _forget()


def _forget() -> None:
    from dreamkernels.devices import loader

    read.cache_clear()
    loader.launch_parameters.cache_clear()


def bucket_of(entry: Mapping[str, Any]) -> tuple[int, int | None]:
    return entry["max_width"], entry.get("max_length")


def parameters_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in NOT_PARAMETERS}


def parse(path: Path, architecture: str) -> dict[str, Any]:
    """The tables of a file, by GPU model. Raises ValueError naming the file when it is not one of ours."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as tuned launch parameters ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of tuned launch parameters (it lacks {FORMAT!r} as format)")
    if content.get("architecture") != architecture:
        raise ValueError(f"{path} was tuned for {content.get('architecture')}, not for {architecture}")
    try:
        for table in content["devices"].values():
            for entries in table["launch"].values():
                for entry in entries:
                    _check(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a damaged table of launch parameters ({error!r})") from None
    return content["devices"]


def _check(entry: dict[str, Any]) -> None:
    bucket_of(entry)
    for name, value in parameters_of(entry).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, not a positive integer")


@cache
def read(architecture: str) -> dict[str, Any]:
    """The tables of the user's file, by GPU model; empty where there is none. One that is not ours warns once."""
    path = cache_folder() / f"{architecture}.json"
    if not _used or not path.is_file():
        return {}
    try:
        return parse(path, architecture)
    except ValueError as error:
        warnings.warn(
            f"{error}; the shipped parameters are used, which may be slower on this GPU. Remove the file, or tune "
            "again: python -m dreamkernels tune",
            TunedParametersWarning,
            stacklevel=2,
        )
        return {}


def standing_in(architecture: str, model: str, kernel: str, shipped: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry tuned on a GPU model for the bucket of a shipped entry, or the shipped one."""
    for entry in read(architecture).get(model, {"launch": {}})["launch"].get(kernel, ()):
        if bucket_of(entry) == bucket_of(shipped) and parameters_of(entry).keys() == parameters_of(shipped).keys():
            return entry
    return shipped


def store(path: Path, architecture: str, model: str, provenance: Mapping[str, str], kernel: str, entry: dict) -> None:
    """Adds one entry to a file, in place of an earlier one of its bucket; other models and buckets stay.

    The file is replaced as a whole, so that a reader never sees half of it. Raises ValueError for a file not ours.
    """
    tables = parse(path, architecture) if path.exists() else {}
    table = tables.setdefault(model, {"launch": {}})
    table["measured"] = dict(provenance)
    others = [old for old in table["launch"].get(kernel, ()) if bucket_of(old) != bucket_of(entry)]
    order = sorted([*others, entry], key=lambda e: (e["max_width"], e.get("max_length", float("inf"))))
    table["launch"][kernel] = order
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(
        json.dumps({"format": FORMAT, "architecture": architecture, "devices": tables}, indent=1) + "\n"
    )
    unfinished.replace(path)
    _forget()
