"""Compiles every shipped kernel for an architecture and reports it."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamkernels import libraries
from dreamkernels.devices import load_device
from dreamkernels.ops.launch import ShippedKernel
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.report import scoreboard
from dreamkernels.report.machine_code import FunctionCode, read_cubin, read_shared_library
from dreamkernels.report.scoreboard import Prediction


@dataclass(frozen=True)
class KernelReport:
    """One kernel at one set of launch parameters on one architecture."""

    name: str
    source: str  # "triton" or "cuda"
    architecture: str
    registers: int
    spill_bytes: int
    local_memory_instructions: int
    shared_bytes: int
    warps: int
    blocks_per_sm: int
    occupancy: float  # resident warps over the most that fit
    limited_by: str
    instructions: int
    global_accesses: dict[str, int]
    tensor_core: dict[str, int]
    prediction: Prediction | None = None


def occupancy(architecture: str, registers: int, shared_bytes: int, warps: int) -> tuple[int, float, str]:
    """Blocks per multiprocessor, occupancy in [0, 1], and what limits it."""
    limits = {name: int(value) for name, value in load_device(architecture).limits.items()}
    unit = limits["register_allocation_unit"]
    registers_per_warp = -(-registers * limits["warp_size"] // unit) * unit
    bounds = {
        "registers": limits["registers_per_sm"] // registers_per_warp // warps,
        "shared memory": limits["shared_memory_per_sm_bytes"]
        // (shared_bytes + limits["reserved_shared_memory_per_block_bytes"]),
        "threads": limits["threads_per_sm"] // (warps * limits["warp_size"]),
        "blocks": limits["blocks_per_sm"],
    }
    if shared_bytes > limits["shared_memory_per_block_bytes"]:
        bounds["shared memory"] = 0
    limit = min(bounds, key=lambda name: bounds[name])
    warps_per_sm = limits["threads_per_sm"] // limits["warp_size"]
    return bounds[limit], bounds[limit] * warps / warps_per_sm, limit


def compile_triton(shipped: ShippedKernel, architecture: str) -> Any:
    """Compiles one Triton kernel ahead of time; needs no GPU. Not possible in a process with TRITON_INTERPRET=1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {**shipped.signature, **dict.fromkeys(shipped.constants, "constexpr")}
    names = shipped.kernel.arg_names
    aligned = [name for name, kind in shipped.signature.items() if kind.startswith("*")] + list(shipped.divisible_by_16)
    source = ASTSource(
        fn=shipped.kernel,
        signature={name: arguments[name] for name in names},
        constexprs={(names.index(name),): value for name, value in shipped.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=shipped.options)


def _report(
    name: str,
    source: str,
    architecture: str,
    code: FunctionCode,
    shared_bytes: int,
    warps: int,
    prediction: Prediction | None = None,
) -> KernelReport:
    blocks, share, limited_by = occupancy(architecture, code.registers, shared_bytes, warps)
    return KernelReport(
        name=name,
        source=source,
        architecture=architecture,
        registers=code.registers,
        spill_bytes=code.stack_bytes,
        local_memory_instructions=code.local_memory_instructions,
        shared_bytes=shared_bytes,
        warps=warps,
        blocks_per_sm=blocks,
        occupancy=share,
        limited_by=limited_by,
        instructions=code.instructions,
        global_accesses=code.global_accesses,
        tensor_core=code.tensor_core,
        prediction=prediction,
    )


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """Every Triton kernel of every operator at every launch parameter of an architecture."""
    for module in sorted({operator.triton.partition(":")[0] for operator in OPERATORS.values() if operator.triton}):
        yield from importlib.import_module(module).shipped_kernels(architecture)


def report_triton_kernel(shipped: ShippedKernel, architecture: str, predict: bool = False) -> KernelReport:
    compiled = compile_triton(shipped, architecture)
    (code,) = read_cubin(compiled.asm["cubin"])
    shared_bytes, warps = compiled.metadata.shared, shipped.num_warps
    prediction = None
    if predict:
        blocks = occupancy(architecture, code.registers, shared_bytes, warps)[0]
        prediction = scoreboard.predict(code.listing, architecture, warps, blocks)
    return _report(shipped.name, "triton", architecture, code, shared_bytes, warps, prediction)


def readable(mangled: str) -> str:
    """The C++ name of a kernel with its template arguments, without namespaces and argument list."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p  # the few bytes it allocates are not freed
    name = (demangle(mangled.encode(), None, None, None) or mangled.encode()).decode()
    name = re.sub(r"\((?:int|bool)\)", "", name.removeprefix("void "))
    return name.partition("(")[0].rpartition("kernels::")[2].replace(" ", "")


def report_cuda_kernels(path: Path, architecture: str) -> list[KernelReport]:
    rows = []
    for code in read_shared_library(path, architecture):
        if not code.max_threads:
            raise ValueError(f"CUDA kernel {code.name} needs __launch_bounds__, so that its occupancy is known")
        warps = code.max_threads // 32
        rows.append(_report(readable(code.name), "cuda", architecture, code, code.static_shared_bytes, warps))
    return sorted(rows, key=lambda row: row.name)


def report_kernels(
    architecture: str, progress: Callable[[int, int], None] = lambda done, total: None, predict: bool = False
) -> list[KernelReport]:
    """Reports every Triton kernel, and every CUDA C++ kernel when that library is loaded, for "sm_80" or "sm_90".

    With `predict`, Triton kernels that use tensor cores also carry the unvalidated model's prediction (scoreboard.py).

    Raises RuntimeError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the static report compiles kernels; run it without TRITON_INTERPRET=1")
    todo = list(shipped_kernels(architecture))
    rows = []
    for done, shipped in enumerate(todo):
        progress(done, len(todo))
        rows.append(report_triton_kernel(shipped, architecture, predict))
    progress(len(todo), len(todo))
    cuda = libraries.LOADED["_cuda"]
    return rows + (report_cuda_kernels(cuda.path, architecture) if cuda.path else [])
