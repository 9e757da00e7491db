"""Reads the device files. Nothing is tuned at run time: launch parameters are looked up, the user's own ones first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dreamkernels.devices import tuned

ARCHITECTURES = (
    "sm_80",
    "sm_90",
)  # ascending; a newer or in-between GPU uses the nearest one that is not newer than it


@dataclass(frozen=True)
class Device:
    """One architecture: `limits` by name, `launch` parameters by kernel and the order of implementations by operator
    (`choice`, where it depends on more than the device), each with its provenance."""

    architecture: str
    device: str
    limits: dict[str, float]
    limits_provenance: str
    launch: dict[str, list[dict[str, int]]]
    launch_provenance: str
    choice: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    choice_provenance: str = ""


@cache
def load_device(architecture: str) -> Device:
    """The file of one of ARCHITECTURES, or of "cpu"."""
    if architecture not in (*ARCHITECTURES, "cpu"):
        raise ValueError(f"architecture {architecture!r} is not known ({', '.join((*ARCHITECTURES, 'cpu'))})")
    path = Path(__file__).with_name(f"{architecture}.json")
    return Device(**json.loads(path.read_text()))


@cache
def architecture_of(device: torch.device) -> str:
    """The architecture whose launch parameters serve a device. In Triton's interpreter (CPU tensors) the oldest one."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [name for name in ARCHITECTURES if int(name.removeprefix("sm_")) <= 10 * major + minor]
    if not fitting:
        raise ValueError(
            f"compute capability {major}.{minor} is not supported (8.0 or newer); choose implementation='reference'"
        )
    return fitting[-1]


@cache
def model_served_by(architecture: str) -> str:
    """The name of the GPUs of this process that an architecture's launch parameters serve; "" when they have several
    names or there is none, and then nothing tuned is used."""
    if not torch.cuda.is_available():
        return ""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    supported = [device for device in devices if torch.cuda.get_device_capability(device) >= (8, 0)]
    names = {torch.cuda.get_device_name(d) for d in supported if architecture_of(d) == architecture}
    return names.pop() if len(names) == 1 else ""


_trials: dict[tuple[str, tuple[int, int | None]], Mapping[str, Any]] = {}


@contextlib.contextmanager
def trying(kernel: str, entry: Mapping[str, Any]) -> Iterator[None]:
    """Within it an entry stands in for all others of its kernel and bucket: how candidates are timed and checked."""
    key = (kernel, tuned.bucket_of(entry))
    _trials[key] = entry
    launch_parameters.cache_clear()
    try:
        yield
    finally:
        del _trials[key]
        launch_parameters.cache_clear()


@cache
def launch_parameters(architecture: str, kernel: str, width: int, length: int = 0) -> dict[str, Any]:
    """The launch parameters of a kernel for rows of `width` elements (and sequences of `length` of them, where its
    entries tell lengths apart): the first entry whose max_width and max_length are not exceeded, or the one that
    `python -m dreamkernels tune` measured in its place on this GPU.

    Raises ValueError when the width is above every entry.
    """
    entries = load_device(architecture).launch[kernel]
    for entry in entries:
        if width <= entry["max_width"] and length <= entry.get("max_length", length):
            chosen = _trials.get((kernel, tuned.bucket_of(entry)))
            if chosen is None:
                chosen = tuned.standing_in(architecture, model_served_by(architecture), kernel, entry)
            return tuned.parameters_of(chosen)
    raise ValueError(
        f"width {width} is not supported by {kernel} on {architecture} (at most {entries[-1]['max_width']}); "
        'choose implementation="reference"'
    )


@cache
def order_of_choice(operator: str, device: str, width: int) -> tuple[tuple[str, ...], str]:
    """The implementations of an operator for rows of `width` elements, best first, and how that order was found.

    `device` is one of ARCHITECTURES or "cpu".
    """
    table = load_device(device)
    entry = next(entry for entry in table.choice[operator] if width <= entry.get("max_width", width))
    return tuple(entry["order"]), table.choice_provenance
