"""Builds the three native parts of dreamkernels. Everything else about the package is in pyproject.toml.

- dreamkernels/_cpu.abi3.so: CPU operators against LibTorch's stable ABI, independent of the torch and Python version.
- dreamkernels/_cuda.abi3.so: CUDA operators, compiled by nvcc for sm_80, sm_90 and PTX; also loads on a CPU-only torch.
- dreamkernels/_C.*.so: pybind11 module without torch: build information, sequence packing, resizing of pictures.

Settings, read from the environment because pip passes nothing else through reliably:

- DREAMKERNELS_BUILD_CUDA=auto|0|1. auto (default): build the CUDA library when nvcc is found. 1: a missing nvcc is an
  error.
- CXX, NVCC: the compilers to use.

Without a C++ compiler the package installs without native parts; its reference and Triton implementations then serve.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # symbols of torch 2.11 and no newer ones
CUDA_ARCHITECTURES = ("sm_80", "sm_90", "compute_90")

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
CXX_FLAGS += ["-Wno-maybe-uninitialized"]  # false alarms in gcc's own AVX-512 header
# Every `cpu_kernels*.cpp` is compiled once per instruction set; the level is chosen at run time (csrc/common/isa.h).
ISA_FLAGS = {"scalar": ["-DDK_VEC_LEVEL=0"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-DDK_VEC_LEVEL=2", "-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        "-DDK_VEC_LEVEL=512",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ]
    ISA_FLAGS["avx512bf16"] = ["-DDK_VEC_LEVEL=513", *ISA_FLAGS["avx512"][1:], "-mavx512bf16"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]


def say(message: str) -> None:
    print(f"dreamkernels: {message}", file=sys.stderr, flush=True)


@dataclass
class Step:
    """One compiler call: makes `output` from `inputs`."""

    output: Path
    inputs: list[Path]
    command: list[str]
    makes_depfile: bool = False


@dataclass
class NativeLibrary:
    """One shared library: its compile steps, and the link step that needs them all."""

    name: str
    objects: list[Step] = field(default_factory=list)
    link: Step | None = None

    def steps(self) -> list[Step]:
        return [*self.objects, self.link] if self.link else []


def torch_include_directories() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("dreamkernels: torch is not installed; install torch first, then: pip install --no-build-isolation .")
    found = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < TORCH_MINIMUM:
        sys.exit(f"dreamkernels: torch {found} is too old to build against; install torch >= 2.11 first")
    include = Path(next(iter(spec.submodule_search_locations))) / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def find_cxx() -> list[str] | None:
    for candidate in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++", "clang++"):
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return words
        if words and candidate == os.environ.get("CXX"):
            return None  # what the user named does not exist: do not take another one behind their back
    return None


def find_nvcc() -> str | None:
    if named := os.environ.get("NVCC"):
        return shutil.which(named)
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{cuda_home}/bin" if cuda_home else None) or shutil.which("nvcc")


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]


def nvcc_release(nvcc: str) -> str:
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", printed)
    return release.group(1) if release else "unknown"


def git_commit() -> str:
    if not (ROOT / ".git").exists():
        return "unknown"
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


class Plan:
    """Turns the sources under csrc/ into compile and link steps."""

    def __init__(self, work: Path, torch_include: list[Path]) -> None:
        self.work = work
        self.torch_include = torch_include
        # Only names libtorch_cpu as needed: `import torch` has loaded it, whichever torch that is. No path is recorded.
        self.torch_link = [f"-L{torch_include[0].parent / 'lib'}", "-ltorch_cpu"]
        self.torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-isystem{path}" for path in torch_include)]
        self.include_flags = [f"-I{ROOT / 'csrc'}", f"-ffile-prefix-map={ROOT}=."]

    def cpu(self, cxx: list[str], output: Path) -> NativeLibrary:
        library = NativeLibrary("_cpu")
        for source in [*sorted((ROOT / "csrc").glob("*/cpu.cpp")), ROOT / "csrc" / "common" / "isa.cpp"]:
            library.objects.append(self._compile(cxx, source, "", self.torch_flags))
        for source in sorted((ROOT / "csrc").glob("*/cpu_kernels*.cpp")):
            for isa, flags in ISA_FLAGS.items():
                library.objects.append(self._compile(cxx, source, f".{isa}", [*flags, f"-DDK_ISA={isa}"]))
        for step in library.objects:  # isa.cpp and the dispatch tables must know which levels exist
            step.command += [f"-DDK_HAS_{isa.upper()}=1" for isa in ISA_FLAGS]
        library.link = self._link(cxx, library, output, self.torch_link)
        return library

    def cuda(self, nvcc: str, output: Path) -> NativeLibrary:
        library = NativeLibrary("_cuda")
        generate = []
        for architecture in CUDA_ARCHITECTURES:
            virtual = architecture.replace("sm_", "compute_")
            generate += ["-gencode", f"arch={virtual},code={architecture}"]
        flags = [*NVCC_FLAGS, *generate, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{ROOT / 'csrc'}"]
        flags += [f"-isystem={path}" for path in self.torch_include]
        for source in sorted((ROOT / "csrc").glob("*/cuda.cu")):
            target = self._object(source, "")
            command = [nvcc, *flags, "-MD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target)]
            library.objects.append(Step(target, [source], command, makes_depfile=True))
        objects = [step.output for step in library.objects]
        link = [
            nvcc,
            "-shared",
            "-cudart",
            "static",
            *generate,
            *map(str, objects),
            *self.torch_link,
            "-o",
            str(output),
        ]
        library.link = Step(output, objects, link)
        return library

    def pybind(self, cxx: list[str], output: Path, information: dict[str, str]) -> NativeLibrary:
        import pybind11

        library = NativeLibrary("_C")
        self._write_build_information(information)
        include = [pybind11.get_include(), sysconfig.get_path("include"), str(self.work / "generated")]
        flags = [f"-isystem{path}" for path in include]
        for source in sorted((ROOT / "csrc").glob("*.cpp")):
            library.objects.append(self._compile(cxx, source, "", flags))
        extra = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        library.link = self._link(cxx, library, output, extra)
        return library

    def _write_build_information(self, information: dict[str, str]) -> None:
        def quoted(text: str) -> str:
            escaped = text.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{escaped}"'

        rows = "".join(f"    {{{quoted(key)}, {quoted(value)}}},\n" for key, value in information.items())
        header = self.work / "generated" / "build_information.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        text = f"#pragma once\nstatic constexpr const char* kBuildInformation[][2] = {{\n{rows}}};\n"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)

    def _object(self, source: Path, suffix: str) -> Path:
        return self.work / f"{source.relative_to(ROOT).with_suffix('')}{suffix}.o"

    def _compile(self, cxx: list[str], source: Path, suffix: str, flags: list[str]) -> Step:
        target = self._object(source, suffix)
        command = [*cxx, *CXX_FLAGS, *self.include_flags, *flags, "-MD", "-MF", f"{target}.d"]
        return Step(target, [source], [*command, "-c", str(source), "-o", str(target)], makes_depfile=True)

    def _link(self, cxx: list[str], library: NativeLibrary, output: Path, extra: list[str]) -> Step:
        objects = [step.output for step in library.objects]
        return Step(output, objects, [*cxx, "-shared", "-s", *map(str, objects), *extra, "-o", str(output)])


def run_steps(libraries: list[NativeLibrary], work: Path) -> None:
    """Runs all steps, in parallel, as far as they get. Failed outputs do not exist afterwards."""
    steps = [step for library in libraries for step in library.steps()]
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    for library in libraries:  # a library of an earlier build must not pass for this one's
        if library.link:
            library.link.output.unlink(missing_ok=True)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja:
        subprocess.run([ninja, "-k", "0", "-C", str(work), "-f", str(write_ninja(steps, work))], check=False)
    else:
        say("ninja not found; compiling without it")
        run_in_threads(libraries)


def write_ninja(steps: list[Step], work: Path) -> Path:
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5"]
    for number, step in enumerate(steps):
        lines += [f"rule step{number}", f"  command = {shlex.join(step.command).replace('$', '$$')}"]
        lines += [f"  description = {step.output.name} <- {', '.join(path.name for path in step.inputs)}"]
        if step.makes_depfile:
            lines += [f"  depfile = {step.output}.d", "  deps = gcc"]
        lines += [f"build {escape(step.output)}: step{number} {' '.join(escape(path) for path in step.inputs)}"]
    path = work / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_in_threads(libraries: list[NativeLibrary]) -> None:
    def run(step: Step) -> None:
        if subprocess.run(step.command, check=False).returncode != 0:
            step.output.unlink(missing_ok=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, [step for library in libraries for step in library.objects]))
    for library in libraries:
        if library.link and all(step.output.exists() for step in library.objects):
            run(library.link)


class BuildNative(build_ext):
    """Replaces the compile phase of build_ext by the plan above; installing and editable mode stay setuptools'."""

    def get_ext_filename(self, fullname: str) -> str:
        package, _, name = fullname.rpartition(".")
        if name in ("_cpu", "_cuda"):
            return str(Path(package.replace(".", "/")) / f"{name}.abi3.so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch_include = torch_include_directories()
        if sys.platform == "win32":
            say("native parts are not built on Windows; the reference implementations serve")
            return
        cxx, nvcc = find_cxx(), self._nvcc()
        if cxx is None:
            say("NO C++ COMPILER FOUND: installing without compiled CPU operators and without dreamkernels._C.")
            say("The reference (eager PyTorch) and Triton serve; on the CPU that is several times slower.")
            say("Install g++ (or set CXX) and install again to get them.")
            return
        work = Path(self.build_temp).resolve() / "native"
        work.mkdir(parents=True, exist_ok=True)
        output = {
            name: Path(self.get_ext_fullpath(f"dreamkernels.{name}")).resolve() for name in ("_cpu", "_cuda", "_C")
        }
        plan = Plan(work, torch_include)
        libraries = [plan.cpu(cxx, output["_cpu"])]
        if nvcc:
            libraries.append(plan.cuda(nvcc, output["_cuda"]))
        if importlib.util.find_spec("pybind11"):
            libraries.append(plan.pybind(cxx, output["_C"], self._information(cxx, nvcc)))
        else:
            say("pybind11 not found: installing without dreamkernels._C (packing and resizing run more slowly)")
        run_steps(libraries, work)
        self._judge(libraries)

    def _nvcc(self) -> str | None:
        wanted = os.environ.get("DREAMKERNELS_BUILD_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"dreamkernels: DREAMKERNELS_BUILD_CUDA={wanted!r} is not supported (auto, 0 or 1)")
        nvcc = None if wanted == "0" else find_nvcc()
        if wanted == "1" and nvcc is None:
            sys.exit("dreamkernels: DREAMKERNELS_BUILD_CUDA=1 but nvcc was not found; set PATH, CUDA_HOME or NVCC")
        if nvcc is None:
            say("building without the CUDA C++ library" + (" (nvcc not found)" if wanted == "auto" else ""))
        return nvcc

    def _information(self, cxx: list[str], nvcc: str | None) -> dict[str, str]:
        return {
            "compiler": first_line([*cxx, "--version"]),
            "flags": shlex.join(CXX_FLAGS),
            "cpu_isas": ",".join(ISA_FLAGS),
            "torch_target_version": TORCH_TARGET,
            "nvcc": nvcc_release(nvcc) if nvcc else "",
            "cuda_architectures": ",".join(CUDA_ARCHITECTURES) if nvcc else "",
            "git_commit": git_commit(),
        }

    def _judge(self, libraries: list[NativeLibrary]) -> None:
        for library in libraries:
            if library.link is None or library.link.output.exists():
                continue
            if library.name == "_cuda" and os.environ.get("DREAMKERNELS_BUILD_CUDA", "auto") == "auto":
                say(
                    "THE CUDA C++ LIBRARY DID NOT BUILD (messages above); continuing without it, Triton serves on GPUs."
                )
                continue
            sys.exit(f"dreamkernels: building {library.name} failed; the compiler's messages are above")


setup(
    ext_modules=[Extension(f"dreamkernels.{name}", sources=[], optional=True) for name in ("_cpu", "_cuda", "_C")],
    cmdclass={"build_ext": BuildNative},
)
