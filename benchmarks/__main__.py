"""`python -m benchmarks run [name or family ...]`: times operators and models, prints tables, can record them.

What was recorded: `report` (Markdown and a page), `compare A B`, `gate RECORD --against BASELINE`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.reporting.commands import add_commands

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


def available() -> dict[str, str]:
    """Benchmark names and their modules: operators, then whole models."""
    return {
        path.stem.removeprefix("bench_"): f"benchmarks.{folder}.{path.stem}"
        for folder in ("ops", "models")
        for path in sorted((ROOT / folder).glob("bench_*.py"))
    }


def chosen(wanted: list[str]) -> dict[str, ModuleType]:
    """The modules of the wanted names and families, or all. Raises ValueError for a name that is neither."""
    modules = {name: importlib.import_module(path) for name, path in available().items()}
    families = sorted({module.FAMILY for module in modules.values()})
    for name in wanted:
        if name not in modules and name not in families:
            raise ValueError(f"{name!r} has no benchmark (families: {', '.join(families)}; one: {', '.join(modules)})")
    return {name: m for name, m in modules.items() if not wanted or name in wanted or m.FAMILY in wanted}


def git_commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def print_result(result: Any) -> None:
    ours = next(iter(result.case.contenders))
    print(f"\n{result.case.operator}  {result.case.label}")
    width = max(16, *map(len, result.case.contenders))
    bandwidth = result.case.bytes_moved > 0  # the share says nothing of a loop that no copy is like
    title = "of copy bandwidth" if bandwidth else ""
    print(f"  {'':{width}} {'min us':>11} {'median us':>11} {title:>18}   {ours} is")
    for timing in result.timings:
        ratio = timing.minimum_us / result.minimum(ours)
        faster = "" if timing.contender == ours else f"{ratio:.2f}x as fast"
        share = f"{100 * result.share_of_copy_bandwidth(timing.contender):.0f}%" if bandwidth else ""
        memory = result.peak_extra_bytes.get(timing.contender)
        held = "" if memory is None else f"   holds {memory / 1e6:.1f} MB more"
        if result.case.samples:
            held += f"   {result.seconds_per_sample(timing.contender):.4g} s per sample"
        times = f"{timing.minimum_us:11.1f} {timing.median_us:11.1f}"
        print(f"  {timing.contender:{width}} {times} {share:>18}   {faster}{held}")
    for contender, reason in result.failures.items():
        print(f"  {contender:{width}} not timed: {reason}")
    if bandwidth:
        print(f"  {'copy':{width}} {result.copy_minimum_us:11.1f}", flush=True)


def print_summary(results: list[Any]) -> None:
    """One line per case: how many times as fast as each contender ours is, and the share of memory it holds."""
    columns: list[str] = []
    for result in results:
        columns += [t.contender for t in result.timings[1:] if t.contender not in columns]
    label_width = max(len(f"{r.case.operator} {r.case.label}") for r in results)
    print(f"\n{'times as fast as':{label_width}}  {'ours us':>10}" + "".join(f"  {name[:22]:>22}" for name in columns))
    for result in results:
        ours = result.timings[0]
        ratios = {t.contender: f"{t.minimum_us / ours.minimum_us:.2f}x" for t in result.timings[1:]}
        for name in ratios:
            if name in result.peak_extra_bytes:
                held = result.peak_extra_bytes[ours.contender] / max(1, result.peak_extra_bytes[name])
                ratios[name] += f", {held:.2f} of its memory"
        label = f"{result.case.operator} {result.case.label}"
        cells = "".join(f"  {ratios.get(name, ''):>22}" for name in columns)
        print(f"{label:{label_width}}  {ours.minimum_us:10.1f}{cells}")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from benchmarks.harness import matmul_gflops, measure
    from dreamkernels import information

    try:
        modules = chosen(arguments.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    facts = information.collect()
    settings = f"{arguments.device}, {arguments.caches} caches, {arguments.threads} threads"
    print(f"{facts['devices']['cpu']}, {facts['devices']['cpu_isa']}; torch {torch.__version__}; {settings}")
    results, boundaries = [], {}
    for name, module in modules.items():
        for case in module.cases(arguments.device):
            result = measure(case, seconds=arguments.seconds, caches=arguments.caches)
            print_result(result)
            results.append(result)
        boundaries[name] = module.boundary(arguments.device)
        if not boundaries[name]:
            continue
        print(f"\n{name}: microseconds per call on a tiny tensor")
        for what, microseconds in boundaries[name].items():
            print(f"  {what:36} {microseconds:6.1f}")
    print_summary(results)
    if arguments.record:
        reached = {dtype: round(gflops, 1) for dtype, gflops in matmul_gflops(arguments.device).items()}
        path = ROOT / "results" / f"{arguments.record}.json"
        path.write_text(
            json.dumps(
                {
                    "date": datetime.date.today().isoformat(),
                    "commit": git_commit(),
                    "device": arguments.device,
                    "devices": facts["devices"],
                    "versions": facts["versions"],
                    "threads": arguments.threads,
                    "settings": {name: os.environ.get(name) for name in (*SETTINGS, *KEEP_FREED_MEMORY)},
                    "limits": {"matmul_gflops": reached},
                    "cases": [result.record() for result in results],
                    "boundary_us": boundaries,
                },
                indent=1,
            )
            + "\n"
        )
        print(f"\nrecorded in benchmarks/results/{path.name}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("run", help="time operators against PyTorch on this machine")
    command.add_argument("names", nargs="*", help=f"a family or a benchmark; default: all ({', '.join(available())})")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
    command.add_argument("--record", metavar="NAME", help="write benchmarks/results/NAME.json")
    command.set_defaults(run=run)
    add_commands(commands)
    arguments = parser.parse_args()
    if arguments.run is not run:
        return arguments.run(arguments)
    wanted = SETTINGS | (KEEP_FREED_MEMORY if arguments.allocator == "keep" else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # All of them are read when the process starts.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **wanted})
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
