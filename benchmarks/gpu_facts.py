"""What a measurement is worth nothing without: `python -m benchmarks.gpu_facts FILE` writes it as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.running import git_commit

SMI = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,power.limit,temperature.gpu"


def _printed(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, Any]:
    """Versions, commit, and the properties of every GPU."""
    gpus = []
    for number in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "name": p.name,
                "compute_capability": f"{p.major}.{p.minor}",
                "multiprocessors": p.multi_processor_count,
                "memory_bytes": p.total_memory,
                "l2_bytes": p.L2_cache_size,
                "shared_memory_per_sm_bytes": p.shared_memory_per_multiprocessor,
                "registers_per_sm": p.regs_per_multiprocessor,
            }
        )
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "triton", "numpy", "transformers", "diffusers")},
        "cuda_of_torch": torch.version.cuda or "no",
        "nvcc": _printed("nvcc", "--version").splitlines()[-1:],
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "nvidia_smi": _printed("nvidia-smi", f"--query-gpu={SMI}", "--format=csv"),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.gpu_facts FILE")
    facts = collect()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
