"""Where each operator's launch parameters come from: the shipped table, or measurements on this GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreamkernels.devices import tuned
from dreamkernels.devices.loader import load_device


@dataclass(frozen=True)
class LaunchSource:
    """Of one operator on one architecture: the entries of its kernels, and how many stand-ins were measured here."""

    entries: int
    tuned: int

    def __str__(self) -> str:
        if not self.tuned:
            return "shipped"
        return "tuned" if self.tuned == self.entries else f"{self.tuned} of {self.entries} tuned"


def launch_sources(architecture: str, model: str, operators: Mapping[str, Sequence[str]]) -> dict[str, LaunchSource]:
    """By operator; `operators` names the kernels of each, `model` the GPU ("" for none, which uses what is shipped)."""
    launch = load_device(architecture).launch
    found = {}
    for operator, kernels in operators.items():
        entries = [(kernel, entry) for kernel in kernels for entry in launch[kernel]]
        measured = sum(tuned.standing_in(architecture, model, kernel, entry) is not entry for kernel, entry in entries)
        found[operator] = LaunchSource(len(entries), measured)
    return found


def origin_of_tuned(architecture: str, model: str) -> str:
    """Of the table that was measured on GPU `model`: on what, when and where it lies; "" where there is none."""
    table = tuned.read(architecture).get(model)
    if table is None:
        return ""
    measured = table.get("measured", {})
    facts = [f"{name} {measured[name]}" for name in ("driver", "torch", "triton", "commit") if measured.get(name)]
    told = ", ".join([model, *facts, *filter(None, [measured.get("date")])])
    return f"measured on {told}; {tuned.cache_folder() / f'{architecture}.json'}"
