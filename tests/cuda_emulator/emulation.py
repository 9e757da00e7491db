"""Builds kernels with the emulator and calls them: see emulator.h for what it is strict about."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEEDS = (0, 1, 2, 3)
_FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DDREAMKERNELS_CUDA_EMULATOR"]
_INCLUDE = [f"-I{HERE.parent}", f"-I{ROOT / 'csrc'}"]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the emulator is compiled by g++, which is missing"
)
needs_race_checker = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("setarch") is None or platform.machine() != "x86_64",
    reason="the race checker needs g++ with ThreadSanitizer and setarch, on x86-64",
)


class MisuseError(RuntimeError):
    """A kernel did what CUDA leaves undefined; the message says what, in which block and thread, and at which line."""


class Counters(ctypes.Structure):
    """What a kernel did: see emulator.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("barriers", "collectives", "mma", "ldmatrix", "ldmatrix_wavefronts", "copies")
    ]


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cuda_emulator_")


@functools.cache
def _runtime(flags: tuple[str, ...]) -> Path:
    """The scheduler, compiled once per set of flags; never with a sanitizer."""
    target = Path(_directory().name) / f"runtime{abs(hash(flags))}.o"
    _compile([*_FLAGS, "-O2", "-fPIC", *flags, *_INCLUDE, "-c", str(HERE / "runtime.cpp"), "-o", str(target)])
    return target


def _compile(arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class EmulatedLibrary:
    """Functions `const char* name(...)` of one C++ file; each returns the message of a misuse, or null."""

    def __init__(self, source: str, flags: tuple[str, ...] = ()) -> None:
        target = Path(_directory().name) / f"{Path(source).stem}{abs(hash(flags))}.so"
        inputs = [str(HERE / source), str(_runtime(flags))]
        _compile([*_FLAGS, "-O2", "-fPIC", "-shared", *flags, *_INCLUDE, *inputs, "-o", str(target)])
        self._library = ctypes.CDLL(str(target))

    def __call__(self, name: str, *arguments: Any, seed: int = 0) -> Counters:
        """Calls a function; tensors and structures become pointers, numbers double or int64. Raises MisuseError."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        before, after = Counters(), Counters()
        self._library.emulator_counters(ctypes.byref(before))
        self._library.emulator_set_seed(seed)
        message = function(*map(_as_c, arguments))
        if message is not None:
            raise MisuseError(message.decode())
        self._library.emulator_counters(ctypes.byref(after))
        return Counters(*(getattr(after, name) - getattr(before, name) for name, _ in Counters._fields_))


def _as_c(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int64(value)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, its last byte followed by memory that nobody may touch: a kernel that goes past it is caught.

    The copy ends at the guard, so its beginning is aligned to its size only.
    """
    size = max(1, tensor.numel() * tensor.element_size())
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, inside + mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert libc.mprotect(ctypes.c_void_p(start + inside), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = inside - tensor.numel() * tensor.element_size()
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=max(1, tensor.numel()), offset=min(offset, inside - size))
    copy = copy[: tensor.numel()].view(tensor.shape)
    return copy.copy_(tensor)


class RaceChecked:
    """The main program of one C++ file under ThreadSanitizer, which sees every CUDA thread as a thread."""

    def __init__(self, source: str, flags: tuple[str, ...] = ()) -> None:
        self._program = Path(_directory().name) / f"{Path(source).stem}_races{abs(hash(flags))}"
        flags = ("-DEMULATOR_TSAN", *flags)
        inputs = [str(HERE / source), str(_runtime(flags))]
        options = ["-O1", "-fsanitize=thread", "-DEMULATOR_MAIN", *flags, *_INCLUDE]
        _compile([*_FLAGS, *options, *inputs, "-o", str(self._program)])

    def __call__(self, *arguments: Any) -> list[str]:
        """Runs it; returns a line for each race: the places of the two accesses. Raises MisuseError, too."""
        # ThreadSanitizer lays out its memory for an address space that is not randomised.
        command = ["setarch", platform.machine(), "-R", str(self._program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            raise MisuseError(done.stdout.strip())
        reports = done.stderr.split("WARNING: ThreadSanitizer: data race")[1:]
        assert "finished" in done.stdout, done.stdout + done.stderr
        assert done.returncode == (66 if reports else 0), done.stderr
        return [_places(report) for report in reports]


def _places(report: str) -> str:
    """Of both accesses, the line of the kernel: "Write at a.cuh:41, Previous read at a.cuh:67"."""
    accesses = re.findall(
        r"^  ((?:Previous )?(?:\w+ )?(?:read|write)) of size.*?:\n(.*?)\n\n", report, re.I | re.M | re.S
    )
    places = [(kind, re.search(r"(\w+\.cuh:\d+)", frames)) for kind, frames in accesses]
    return ", ".join(f"{kind} at {place.group(1) if place else 'an unknown place'}" for kind, place in places)
