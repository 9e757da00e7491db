"""Loads the compiled parts of the package, once, and says which of them are missing and what that costs."""

from __future__ import annotations

import ctypes
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

CPU_ISAS = ("scalar", "avx2", "avx512", "avx512bf16")  # in the order of enum Isa in csrc/common/isa.h
_PACKAGE = Path(__file__).resolve().parent


class MissingLibraryWarning(UserWarning):
    """A compiled part of dreamkernels is missing; a slower implementation serves."""


@dataclass(frozen=True)
class Library:
    """One compiled part: whether it is loaded, and if not, why and what that costs."""

    name: str
    provides: str
    cost: str
    path: Path | None = None
    error: str = ""

    @property
    def loaded(self) -> bool:
        return self.path is not None


def _load_operators(name: str, provides: str, cost: str) -> Library:
    path = _PACKAGE / f"{name}.abi3.so"
    if not path.exists():
        return Library(name, provides, cost, error="it was not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(name, provides, cost, error=str(error.__cause__ or error))
    return Library(name, provides, cost, path=path)


def _load_extension() -> tuple[Library, ModuleType | None]:
    provides = "sequence packing, resizing of pictures, build information"
    cost = "packing runs in Python, about a hundred times slower, and Pillow resizes pictures, a third as fast"
    try:
        module = importlib.import_module("dreamkernels._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return Library("_C", provides, cost, error="it was not built" if missing else str(error)), None
    return Library("_C", provides, cost, path=Path(str(module.__file__))), module


# Filled by load(), which dreamkernels/__init__.py calls after the schemas are defined.
LOADED: dict[str, Library] = {}
EXTENSION: ModuleType | None = None


def load() -> None:
    """Loads every compiled part that is there. One warning names all that are missing and matter on this machine."""
    global EXTENSION
    if LOADED:
        return
    extension, EXTENSION = _load_extension()
    cpu = _load_operators("_cpu", "compiled CPU operators", "the reference serves on the CPU, several times slower")
    cuda = _load_operators("_cuda", 'CUDA C++ operators (implementation="cuda")', "Triton serves on NVIDIA GPUs")
    LOADED.update({library.name: library for library in (cpu, cuda, extension)})
    # Without a CUDA C++ library nothing is lost by default: it is not worth a warning unless a library is there and
    # broken.
    missing = [part for part in (cpu, extension) if not part.loaded]
    missing += [cuda] if not cuda.loaded and cuda.error != "it was not built" else []
    if missing:
        lines = [
            f"dreamkernels.{part.name} ({part.provides}) is missing: {part.error}; {part.cost}." for part in missing
        ]
        fix = "Install a C++ compiler, then: pip install --no-build-isolation --force-reinstall --no-deps dreamkernels"
        warnings.warn(" ".join([*lines, fix]), MissingLibraryWarning, stacklevel=3)


def _cpu_functions() -> ctypes.CDLL:
    path = LOADED["_cpu"].path
    if path is None:
        raise RuntimeError(f"the CPU library is not loaded: {LOADED['_cpu'].error}")
    return ctypes.CDLL(str(path))


def cpu_isa() -> str:
    """The instruction set that the compiled CPU operators use now, one of CPU_ISAS; "none" without the CPU library."""
    if not LOADED["_cpu"].loaded:
        return "none"
    return CPU_ISAS[_cpu_functions().dreamkernels_cpu_isa()]


def supported_cpu_isas() -> tuple[str, ...]:
    """The instruction sets that are compiled in and that this processor has, slowest first."""
    if not LOADED["_cpu"].loaded:
        return ()
    functions = _cpu_functions()
    return tuple(isa for level, isa in enumerate(CPU_ISAS) if functions.dreamkernels_cpu_isa_supported(level))


def set_cpu_isa(isa: str) -> None:
    """Makes the compiled CPU operators of this process use one instruction set: one of CPU_ISAS, or "auto".

    Meant for tests and benchmarks; "auto" (the best one that the processor has) is in force from the start.
    Raises ValueError for a name that is unknown or that this processor or build does not have.
    """
    supported = supported_cpu_isas()
    if isa != "auto" and isa not in supported:
        raise ValueError(f"cpu isa {isa!r} is not available here ({', '.join((*supported, 'auto'))})")
    _cpu_functions().dreamkernels_set_cpu_isa(-1 if isa == "auto" else CPU_ISAS.index(isa))


def build_information() -> dict[str, str]:
    """How the compiled parts were built: compilers, flags, torch target version, commit. Empty without `_C`."""
    return dict(EXTENSION.build_information()) if EXTENSION else {}
