"""`python -m benchmarks run`: measures the chosen benchmarks, prints tables, records."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent
# Waiting OpenMP threads must sleep, or one busy neighbour costs a scheduler slice per parallel region.
SETTINGS = {"OMP_WAIT_POLICY": "passive"}
# glibc returns freed blocks of 32 MiB and more to the kernel, and every later call pays for page faults: large outputs
# would time the kernel's page allocator. That is what a program with glibc's defaults pays, so it can be asked for.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
FOLDERS = {"operators": "ops", "models": "models"}


def available() -> dict[str, str]:
    """Benchmark names and their modules: operators, then whole models."""
    return {
        path.stem.removeprefix("bench_"): f"benchmarks.{folder}.{path.stem}"
        for folder in FOLDERS.values()
        for path in sorted((ROOT / folder).glob("bench_*.py"))
    }


def chosen(wanted: Sequence[str], exactly: bool = False) -> dict[str, ModuleType | NotInstalled]:
    """The modules of the wanted names and families ("operators": all of theirs), or all. `exactly`: of names only, and
    no others are imported, which takes seconds.

    Raises ValueError for a name that is neither.
    """
    if exactly and wanted and set(wanted) <= set(available()):
        return {name: _import(available()[name]) for name in wanted}
    modules = {name: _import(path) for name, path in available().items()}
    groups = {name: {name, module.FAMILY, _folder(available()[name])} for name, module in modules.items()}
    families = sorted({family for name, names in groups.items() for family in names - {name}} - {""})
    for name in wanted:
        if name not in modules and name not in families:
            raise ValueError(f"{name!r} has no benchmark (families: {', '.join(families)}; one: {', '.join(modules)})")
    return {name: module for name, module in modules.items() if not wanted or groups[name] & set(wanted)}


class NotInstalled:
    """Stands in for a benchmark whose libraries are not here: a row of the results says so."""

    FAMILY = ""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def cases(self, device: str, size: str) -> Iterator[Any]:
        from benchmarks.harness import NotHereError

        raise NotHereError(self.reason)


def _import(path: str) -> ModuleType | NotInstalled:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "dreamkernels", "dreamllm"):
            raise
        return NotInstalled(str(error))


def _folder(path: str) -> str:
    return next(name for name, folder in FOLDERS.items() if path.split(".")[1] == folder)


def git_commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def default_size(device: str) -> str:
    return "working" if device == "cuda" else "small"


class Run:
    """Results so far, and what went wrong."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.size = arguments.size or default_size(arguments.device)
        self.results: list[Any] = []
        self.boundaries: dict[str, dict[str, float]] = {}
        self.errors: dict[str, str] = {}  # by case or benchmark: wrong results, and what raised
        self.not_here: dict[str, str] = {}  # benchmarks that cannot run on this device or at this size

    def benchmark(self, name: str, module: Any) -> None:
        """All cases of one benchmark; one that goes wrong stops no other."""
        from benchmarks.harness import NotHereError

        try:
            for case in module.cases(self.arguments.device, self.size):
                self._case(case)
        except NotHereError as reason:
            self.not_here[name] = str(reason)
            print(f"\n{name}: not run: {reason}", flush=True)
            return
        except Exception as error:  # its next case could not be made
            self._wrong(f"{name}: its cases", error)
            return
        boundary = module.boundary(self.arguments.device)
        if boundary:
            self.boundaries[name] = boundary
            print(f"\n{name}: microseconds per call on a tiny tensor")
            for what, microseconds in boundary.items():
                print(f"  {what:36} {microseconds:6.1f}", flush=True)

    def _case(self, case: Any) -> None:
        from benchmarks.harness import Deferred, measure
        from benchmarks.printing import print_result

        arguments = self.arguments
        deferred = isinstance(case, Deferred)
        name = case.name if deferred else f"{case.operator} {case.label}"
        if arguments.only and arguments.only not in name:
            return
        try:
            if deferred:
                case = case.make()
                name = f"{case.operator} {case.label}"
            result = measure(
                case if arguments.compile else case.without_compiled(),
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                caches=arguments.caches,
            )
        except Exception as error:  # an AssertionError: contenders disagree
            self._wrong(name, error)
            return
        finally:
            del case
            if deferred:
                _free_memory()
        print_result(result)
        self.results.append(result)

    def _wrong(self, what: str, error: Exception) -> None:
        from benchmarks.printing import coloured

        lines = str(error).strip().splitlines() or [""]
        self.errors[what] = f"{type(error).__name__}: {lines[0]}"
        print(f"\n{coloured('WRONG', 'red')}  {what}: {self.errors[what]}", flush=True)

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        from benchmarks.extrapolation import extrapolations
        from benchmarks.timing import matmul_gflops

        arguments = self.arguments
        reached = {dtype: round(gflops, 1) for dtype, gflops in matmul_gflops(arguments.device).items()}
        return {
            "date": datetime.date.today().isoformat(),
            "commit": git_commit(),
            "device": arguments.device,
            "size": self.size,
            "devices": facts["devices"],
            "driver": _driver() if arguments.device == "cuda" else None,
            "versions": facts["versions"],
            "threads": arguments.threads,
            "settings": {name: os.environ.get(name) for name in (*SETTINGS, *KEEP_FREED_MEMORY)},
            "torch_compile": arguments.compile,
            "limits": {"matmul_gflops": reached},
            "cases": [result.record() for result in self.results],
            "extrapolations": [found.record() for found in extrapolations(self.results)],
            "boundary_us": self.boundaries,
            "not_here": self.not_here,
            "errors": self.errors,
        }


def _free_memory() -> None:
    """Of models that nobody needs any more: they hold each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _driver() -> str:
    from dreamkernels.tuning.command import driver

    return driver()


def run(arguments: argparse.Namespace) -> int:
    """1 where a result was wrong or a case failed, 2 for a wrong argument."""
    import torch

    from benchmarks.extrapolation import extrapolations
    from benchmarks.printing import print_extrapolations, print_missing, print_summary
    from dreamkernels import information

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no NVIDIA GPU here", file=sys.stderr)
        return 2
    try:
        modules = chosen(arguments.names, arguments.exactly)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    facts = information.collect()
    this = Run(arguments)
    settings = f"{arguments.device}, {this.size} size, {arguments.caches} caches, {arguments.threads} threads"
    print(f"{facts['devices']['cpu']}, {facts['devices']['cpu_isa']}; torch {torch.__version__}; {settings}")
    for name, module in modules.items():
        this.benchmark(name, module)
    if this.results:
        print_summary(this.results)
        print_extrapolations(extrapolations(this.results))
        print_missing(this.results)
    for what, error in this.errors.items():
        print(f"WRONG  {what}: {error}")
    if arguments.only and not (this.results or this.errors):
        print(f"no case has {arguments.only!r} in its name", file=sys.stderr)
        return 2
    if arguments.record:
        path = ROOT / "results" / f"{arguments.record}.json"  # an absolute name stays what it is
        path.write_text(json.dumps(this.record(facts), indent=1) + "\n")
        inside = path.is_relative_to(ROOT)
        print(f"\nrecorded in {f'benchmarks/results/{path.name}' if inside else path}")
    return 1 if this.errors else 0


def add_run(commands: argparse._SubParsersAction) -> None:
    from benchmarks.harness import SIZES

    command = commands.add_parser("run", help="time operators and models against PyTorch and peers on this machine")
    command.add_argument("names", nargs="*", help=f"a family or a benchmark; default: all ({', '.join(available())})")
    command.add_argument("--exactly", action="store_true", help="names are benchmarks, never families")
    command.add_argument(
        "--only", metavar="TEXT", help="cases with this in their name, such as bfloat16; of dreamllm workloads: stage2"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument(
        "--size",
        choices=SIZES,
        help="small: quick shapes, mini models; working: those of the 7b system; default: small, on cuda working",
    )
    command.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    command.add_argument(
        "--caches", choices=("cold", "warm"), default="cold", help="state of the caches (see harness.py)"
    )
    command.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: freed memory stays in the process; default: glibc's defaults, large blocks are faulted in again",
    )
    command.add_argument("--seconds", type=float, default=4.0, help="per case")
    command.add_argument("--rounds", type=int, default=60, help="per case, at most")
    command.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="contenders under torch.compile"
    )
    command.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json")
    command.set_defaults(run=run)


def restart_with_settings(arguments: argparse.Namespace) -> None:
    """All of them are read when a process starts."""
    wanted = SETTINGS | (KEEP_FREED_MEMORY if arguments.allocator == "keep" else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **wanted})
