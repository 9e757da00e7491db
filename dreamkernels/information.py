"""What `python -m dreamkernels info` prints: versions, devices, libraries, and what each operator supports here."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from dreamkernels import libraries
from dreamkernels.ops.operator import support_matrix
from dreamkernels.version import __version__

_PACKAGES = ("torch", "triton", "numpy", "transformers", "diffusers")


def nvcc_version() -> dict[str, str]:
    version = libraries.build_information().get("nvcc", "")
    return {"nvcc": version} if version else {}


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        names.append(
            f"cuda:{number} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    return names


def collect() -> dict[str, Any]:
    """All facts, as plain values that can be printed as JSON."""
    return {
        "versions": {
            "dreamkernels": __version__,
            "python": platform.python_version(),
            **{package: _version_of(package) for package in _PACKAGES},
        },
        "devices": {
            "cpu": f"{_processor()}, {torch.get_num_threads()} threads",
            "cpu_isa": libraries.cpu_isa(),
            "cpu_isas_supported": list(libraries.supported_cpu_isas()),
            "cuda": _cuda_devices(),
            "torch_built_for_cuda": torch.version.cuda or "no",
        },
        "libraries": [
            {
                "name": part.name,
                "provides": part.provides,
                "loaded": part.loaded,
                "reason": part.error,
                "cost": part.cost,
            }
            for part in libraries.LOADED.values()
        ],
        "build": libraries.build_information(),
        "support": support_matrix(),
    }


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows), ""]


def _support_rows(support: list[dict[str, Any]]) -> list[str]:
    """One line per operator and implementation; reasons once, below the table, by number."""
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    reasons: list[str] = []

    def cell(device: dict[str, Any]) -> str:
        if not device["reason"]:
            return " ".join(short[dtype] for dtype in device["dtypes"])
        if device["reason"] not in reasons:
            reasons.append(device["reason"])
        return f"- ({reasons.index(device['reason']) + 1})"

    table = [("operator", "implementation", "cpu", "cuda")]
    previous = ""
    for row in support:
        name = "" if row["operator"] == previous else row["operator"]
        previous = row["operator"]
        table.append((name, row["implementation"], cell(row["devices"]["cpu"]), cell(row["devices"]["cuda"])))
    widths = [max(len(line[k]) for line in table) for k in range(4)]
    lines = [
        "  " + "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    return ["operators", *lines, *(f"  ({number}) {reason}" for number, reason in enumerate(reasons, 1))]


def as_text(facts: dict[str, Any]) -> str:
    devices = facts["devices"]
    isas = ", ".join(devices["cpu_isas_supported"]) or "none"
    device_rows = [
        ("cpu", devices["cpu"]),
        ("instruction set", f"{devices['cpu_isa']} (this machine and build: {isas})"),
        ("cuda", "; ".join(devices["cuda"]) or f"no device (torch built for CUDA: {devices['torch_built_for_cuda']})"),
    ]
    library_rows = [
        (
            part["name"],
            f"loaded    {part['provides']}" if part["loaded"] else f"MISSING   {part['reason']}; {part['cost']}",
        )
        for part in facts["libraries"]
    ]
    lines = [
        *_section("versions", list(facts["versions"].items())),
        *_section("devices", device_rows),
        *_section("libraries", library_rows),
        *_section("build", list(facts["build"].items()) or [("unknown", "the module that records it is missing")]),
        *_support_rows(facts["support"]),
    ]
    return "\n".join(lines)
