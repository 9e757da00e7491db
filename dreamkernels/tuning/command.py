"""`python -m dreamkernels tune`."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dreamkernels.devices import architecture_of, cache_folder
from dreamkernels.devices.tuned import NOT_PARAMETERS
from dreamkernels.tuning.tune import NO_TIME, CudaTimer, Outcome, tune
from dreamkernels.tuning.workloads import WORKLOADS, operators
from dreamkernels.version import __version__

ROOT = Path(__file__).resolve().parent.parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="OPERATOR", help=f"default: all ({', '.join(operators())}), most valuable first"
    )
    parser.add_argument("--device", default="cuda", help="the GPU to tune, such as cuda:1; default: cuda")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"the file to write; default: the architecture's in {cache_folder()}, which later calls look up",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no entry later; run again to go on")
    parser.add_argument("--again", action="store_true", help="also what the file already holds for this GPU")


def commit() -> str:
    """The commit of a checkout; empty for an installed package."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return "unknown"
    return printed.strip().splitlines()[0] if printed.strip() else "unknown"


def provenance_of(device: torch.device) -> dict[str, str]:
    """What a measured entry is worth nothing without."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver(),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton,
        "dreamkernels": __version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _line(outcome: Outcome) -> str:
    name = f"{outcome.kernel:42} {outcome.bucket!s:34}"
    if outcome.found is None:
        return f"{name} {outcome.reason}"
    found = outcome.found
    kept = " ".join(f"{key}={value}" for key, value in found.parameters.items() if key not in NOT_PARAMETERS)
    gain = "shipped kept" if found.cost == 1.0 else f"{1 / found.cost:.2f}x as fast"
    return f"{name} {gain:14} {kept}   ({found.timed} timed, {found.rejected} rejected)"


def run(arguments: argparse.Namespace) -> int:
    """2: a wrong argument or nothing to tune on; 1: an entry failed; 3: no time was left for all; 0: all are tuned."""
    known = operators()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        print(f"{', '.join(unknown)} cannot be tuned; operators: {', '.join(known)}", file=sys.stderr)
        return 2
    if arguments.device.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        print(
            f"tuning measures on an NVIDIA GPU, and device {arguments.device!r} is "
            + ("not one; " if arguments.device.partition(":")[0] != "cuda" else "not here; ")
            + "without one the shipped parameters are used (python -m dreamkernels info)",
            file=sys.stderr,
        )
        return 2
    try:
        device = torch.device(arguments.device)
        architecture = architecture_of(device)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    model = torch.cuda.get_device_name(device)
    path = arguments.out or cache_folder() / f"{architecture}.json"
    kernels = [kernel for name in arguments.names or known for kernel in known[name]]
    kernels.sort(key=list(WORKLOADS).index)
    print(f"{model}, {architecture}; writing {path}", flush=True)
    failed = late = False
    try:
        with torch.cuda.device(device):
            for outcome in tune(
                WORKLOADS,
                architecture,
                model,
                path,
                CudaTimer(device),
                provenance_of(device),
                str(device),
                arguments.minutes,
                arguments.again,
                kernels,
            ):
                print(_line(outcome), flush=True)
                failed = failed or outcome.reason.startswith("failed")
                late = late or outcome.reason == NO_TIME
    except ValueError as error:
        print(f"{error}; remove it or choose another --out", file=sys.stderr)
        return 2
    return 1 if failed else 3 if late else 0
