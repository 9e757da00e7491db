"""What `python -m dreamkernels info` prints: versions, devices, libraries, and what each operator supports here."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from dreamkernels import libraries
from dreamkernels.devices import ARCHITECTURES, architecture_of, load_device, model_served_by
from dreamkernels.devices.sources import launch_sources, origin_of_tuned
from dreamkernels.ops.operator import support_matrix
from dreamkernels.tuning.workloads import operators as tunable_operators
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


def _architectures_here() -> list[str]:
    """Those that serve this machine's GPUs."""
    if not torch.cuda.is_available():
        return []
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    supported = [device for device in devices if torch.cuda.get_device_capability(device) >= (8, 0)]
    return sorted({architecture_of(device) for device in supported})


def _launch_parameters() -> list[dict[str, Any]]:
    """For each architecture of this machine's GPUs (of all known ones where there is none) and each operator: whether
    shipped or tuned parameters are used, and where both come from."""
    rows = []
    for architecture in _architectures_here() or ARCHITECTURES:
        model = model_served_by(architecture)
        sources = launch_sources(architecture, model, tunable_operators())
        rows.append(
            {
                "architecture": architecture,
                "gpu": model,
                "shipped": load_device(architecture).launch_provenance,
                "tuned": origin_of_tuned(architecture, model),
                "operators": {name: str(source) for name, source in sorted(sources.items())},
            }
        )
    return rows


def _limits() -> list[dict[str, Any]]:
    """What is known of the limits of each device, and from where."""
    tables = [load_device(name) for name in ("cpu", *ARCHITECTURES)]
    return [
        {"architecture": t.architecture, "device": t.device, "limits": t.limits, "provenance": t.limits_provenance}
        for t in tables
    ]


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
        "launch_parameters": _launch_parameters(),
        "limits": _limits(),
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


def _launch_rows(tables: list[dict[str, Any]]) -> list[str]:
    """One line per operator with a column per architecture; where parameters come from below."""
    heads = [", ".join(filter(None, [table["architecture"], table["gpu"]])) for table in tables]
    names = sorted({name for table in tables for name in table["operators"]})
    rows = [("operator", *heads), *((name, *(table["operators"].get(name, "-") for table in tables)) for name in names)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    for table in tables:
        lines.append(f"  {table['architecture']} shipped: {table['shipped']}")
        if table["tuned"]:
            lines.append(f"  {table['architecture']} tuned: {table['tuned']}")
        elif table["gpu"]:
            lines.append(f"  {table['architecture']} tuned: nothing yet; python -m dreamkernels tune")
    return ["launch parameters of GPU kernels", *lines, ""]


def _plain_limits(limits: dict[str, float]) -> str:
    """The rates; what an architecture's multiprocessors hold is in its file."""
    return ", ".join(f"{name} {value:g}" for name, value in limits.items() if name.endswith(("flops", "_per_s")))


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
    limit_rows = [
        (table["architecture"], f"{_plain_limits(table['limits'])}; {table['provenance']}")
        for table in facts["limits"]
        if table["limits"]
    ]
    lines = [
        *_section("versions", list(facts["versions"].items())),
        *_section("devices", device_rows),
        *_section("libraries", library_rows),
        *_section("build", list(facts["build"].items()) or [("unknown", "the module that records it is missing")]),
        *_section("limits", limit_rows),
        *_launch_rows(facts["launch_parameters"]),
        *_support_rows(facts["support"]),
    ]
    return "\n".join(lines)
