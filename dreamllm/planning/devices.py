"""What a plan knows of a device: its limits from a file with a source for each figure, or a CPU's from measurements."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from dreamkernels.products import linear
from dreamllm.planning.records import Records
from dreamllm.training.configuration import Precision

GIB = 2**30
LAUNCH_SECONDS = 5e-6
"""The host gives out an operator in about this time (eager, with autograd): what bounds steps of many small ones."""

LEAST_KERNEL_SECONDS = 3e-6
RESERVED_GIB = 3.0
"""CUDA context, workspaces of the libraries, NCCL, and what the allocator cannot use."""

NETWORK_GB_PER_S = 25.0
"""Per GPU and direction: one 200 Gb/s adapter per GPU, the usual make of such clusters. An assumption."""

LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that large collectives reach. An assumption."""


@dataclass(frozen=True)
class Device:
    """Limits of one device. `efficiency`: share of the limit that each kind of operator reaches.

    `memory_gib` is what the device has, `usable_bytes` without what is reserved. `nvlink_gb_per_s`: both directions
    together; `network_gb_per_s`: per GPU and direction.
    """

    key: str
    name: str
    memory_gib: float
    bf16_dense_tflops: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    gpus_per_node: int
    efficiency: Mapping[str, float]
    sources: Mapping[str, str]
    network_gb_per_s: float = NETWORK_GB_PER_S
    launch_seconds: float = LAUNCH_SECONDS
    least_kernel_seconds: float = LEAST_KERNEL_SECONDS
    reserved_gib: float = RESERVED_GIB

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gib - self.reserved_gib) * GIB

    @property
    def peak_flops(self) -> float:
        return self.bf16_dense_tflops * 1e12


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Operations per second of dense products that a device could do: a GPU's in bfloat16 (also for float32, in which
    it is slower) by its data sheet, a CPU's in the precision's dtype as measured now, in a few tenths of a second. None
    for a GPU that is not in the list."""
    if device.type != "cuda":
        return _measured_flops(torch.float32 if precision == "float32" else torch.bfloat16)
    words = torch.cuda.get_device_name(device).upper().replace("-", " ").split()
    if {"PCIE", "NVL"} & set(words):  # which have other limits under the same name
        return None
    return next((gpu.peak_flops for key, gpu in gpus().items() if key.upper() in words), None)


def _measured_flops(dtype: torch.dtype, side: int = 1024, rounds: int = 4) -> float:
    """Of the fastest of a few square products, with the threads that there are and in the library that layers use."""
    matrix = torch.ones(side, side, dtype=dtype)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        linear(matrix, matrix)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


@cache
def gpus() -> dict[str, Device]:
    """The GPUs of `gpus.json`."""
    values = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
    return {key: Device(key, **limits) for key, limits in values.items()}


def find_device(
    key: str, records: Records | None, network_gb_per_s: float | None = None, gpus_per_node: int | None = None
) -> Device:
    """The device called `key`, with another network if given; "cpu" is the one on which `records` were measured.

    Raises `ValueError` for an unknown one, for "cpu" without records, and for bandwidths that are not positive.
    """
    key = key.lower()
    if key == "cpu":
        device = _processor(records)
    elif key in gpus():
        device = gpus()[key]
    else:
        near = difflib.get_close_matches(key, gpus(), n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        known = "".join(f"\n  {name}: {device.name}" for name, device in gpus().items())
        raise ValueError(
            f"unknown GPU {key!r}.{meant} Known GPUs:{known}\n  cpu: this processor, with --records of dreamllm profile"
        )
    if network_gb_per_s is not None:
        _require_positive("network_gb_per_s", network_gb_per_s)
        device = replace(device, network_gb_per_s=network_gb_per_s)
    if gpus_per_node is not None:
        _require_positive("gpus_per_node", gpus_per_node)
        device = replace(device, gpus_per_node=gpus_per_node)
    return device


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be positive, not {value:g}")


def _processor(records: Records | None) -> Device:
    if records is None:
        raise ValueError(
            "a plan for the cpu needs measured operators: run `dreamllm profile` first and give --records profile.json"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    fastest = max((op.flops / op.seconds for op in records.operators if op.flops and op.seconds), default=1e9)
    moved = max((op.bytes / op.seconds for op in records.operators if op.seconds), default=1e9)
    return Device(
        key="cpu",
        name=records.device,
        memory_gib=memory,
        bf16_dense_tflops=fastest / 1e12,
        memory_gb_per_s=moved / 1e9,
        nvlink_gb_per_s=0.0,
        gpus_per_node=1,
        efficiency={"matrix product": 0.5, "attention": 0.5, "convolution": 0.5, "memory": 0.5},
        sources={"bf16_dense_tflops": "the fastest recorded operator", "memory_gb_per_s": "the fastest recorded one"},
        launch_seconds=0.0,  # part of the records' time between operators
        least_kernel_seconds=0.0,
        reserved_gib=1.0,
    )
