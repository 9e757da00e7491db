"""Reads the device files. Nothing is tuned at run time: launch parameters are looked up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (
    "sm_80",
    "sm_90",
)  # ascending; a newer or in-between GPU uses the nearest one that is not newer than it


@dataclass(frozen=True)
class Device:
    """One architecture: `limits` by name and `launch` parameters by kernel, with their provenance."""

    architecture: str
    device: str
    limits: dict[str, float]
    limits_provenance: str
    launch: dict[str, list[dict[str, int]]]
    launch_provenance: str


@cache
def load_device(architecture: str) -> Device:
    """The file of one of ARCHITECTURES."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not known ({', '.join(ARCHITECTURES)})")
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
def launch_parameters(architecture: str, kernel: str, width: int) -> dict[str, Any]:
    """The launch parameters of a kernel for rows of `width` elements: the first entry whose max_width is not exceeded.

    Raises ValueError when the width is above every entry.
    """
    entries = load_device(architecture).launch[kernel]
    for entry in entries:
        if width <= entry["max_width"]:
            return {name: value for name, value in entry.items() if name != "max_width"}
    raise ValueError(
        f"width {width} is not supported by {kernel} on {architecture} (at most {entries[-1]['max_width']}); "
        'choose implementation="reference"'
    )
