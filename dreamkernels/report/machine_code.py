"""Reads registers, local memory and memory instructions from GPU machine code, with the tools that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCE = re.compile(r"Function (\S+):\s*\n\s*(.*)")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
_INFORMATION_SECTION = re.compile(r"\.nv\.info\.(\S+)")
_TENSOR_CORE = ("HMMA", "HGMMA")
_GLOBAL_ACCESS = re.compile(r"^(LDG|LDGSTS|STG)\.")


@dataclass(frozen=True)
class FunctionCode:
    """One kernel in a cubin."""

    name: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    local_memory_instructions: int  # spills, and arrays that did not fit registers
    instructions: int
    max_threads: int  # __launch_bounds__ or Triton's num_warps * 32; 0 where the code does not say
    global_accesses: dict[str, int]  # such as {"load 16 B": 4, "store 16 B": 2}: instructions by bytes per thread
    # Tensor-core instructions by kind: HMMA (sm_80) works on one warp's registers, HGMMA (sm_90) on shared memory for
    # four warps at once.
    tensor_core: dict[str, int]
    listing: str  # of the whole cubin, with the encodings


def _run(tool: str, *arguments: str, cwd: Path | None = None) -> str:
    path = _TOOLS / tool
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; this build of Triton does not carry {tool}")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _access(opcode: str) -> str | None:
    """LDG.E.128.CONSTANT -> "load 16 B"; so is LDGSTS, which loads into shared memory without waiting."""
    if not _GLOBAL_ACCESS.match(opcode):
        return None
    kind = "load" if opcode.startswith("LDG") else "store"
    for modifier in opcode.split(".")[1:]:
        if modifier in ("64", "128", "256"):
            return f"{kind} {int(modifier) // 8} B"
        if modifier in ("U8", "S8", "U16", "S16"):
            return f"{kind} {int(modifier[1:]) // 8} B"
    return f"{kind} 4 B"


def _max_threads(elf_listing: str) -> dict[str, int]:
    """Block sizes by kernel, from the attributes in cuobjdump -elf."""
    found: dict[str, int] = {}
    lines = iter(elf_listing.splitlines())
    name = ""
    for line in lines:
        if section := _INFORMATION_SECTION.search(line):
            name = section.group(1)
        elif name and ("EIATTR_MAX_THREADS" in line or "EIATTR_REQNTID" in line):
            next(lines)
            x, y, z = (int(word, 16) for word in next(lines).split()[1:4])
            found[name] = x * y * z
    return found


def read_cubin(cubin: bytes) -> list[FunctionCode]:
    """All kernels of one cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = {
            name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
            for name, text in _RESOURCE.findall(_run("cuobjdump", "--dump-resource-usage", file.name))
        }
        listing = _run("nvdisasm", "-c", "-hex", file.name)
        threads = _max_threads(_run("cuobjdump", "-elf", file.name))
    opcodes: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            current = opcodes.setdefault(section.group(1), [])
        elif (instruction := _INSTRUCTION.match(line)) and instruction.group(1) != "NOP":
            current.append(instruction.group(1))
    functions = []
    for name, usage in resources.items():
        code = opcodes.get(name, [])
        accesses = Counter(filter(None, map(_access, code)))
        products = Counter(kind for kind in (opcode.partition(".")[0] for opcode in code) if kind in _TENSOR_CORE)
        functions.append(
            FunctionCode(
                name=name,
                registers=usage["REG"],
                stack_bytes=usage.get("STACK", 0),
                static_shared_bytes=usage.get("SHARED", 0),
                local_memory_instructions=sum(opcode.startswith(("LDL", "STL")) for opcode in code),
                instructions=len(code),
                max_threads=threads.get(name, 0),
                global_accesses=dict(sorted(accesses.items())),
                tensor_core=dict(sorted(products.items())),
                listing=listing,
            )
        )
    return functions


def read_shared_library(path: Path, architecture: str) -> list[FunctionCode]:
    """All kernels for one architecture ("sm_80") inside a shared library that nvcc made."""
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "--extract-elf", "all", str(path.resolve()), cwd=Path(folder))
        cubins = [file.read_bytes() for file in sorted(Path(folder).glob(f"*.{architecture}.cubin"))]
    return [function for cubin in cubins for function in read_cubin(cubin)]
