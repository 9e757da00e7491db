"""`python -m benchmarks bench`: every operator and DreamLLM's workloads at small size, and the report on them.

Made to end within a quarter of an hour on two cores. The workloads' compiled variants are left out, because they alone
would take as long; `python -m benchmarks run models` has them. Pictures that the engine draws beside itself take 10
denoising steps, as their rows say; those beside the original's pattern take its 50.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "operators": ("operators", "--seconds", "1", "--rounds", "60"),
    "models": ("dreamllm", "inference", "--no-compile", "--rounds", "5", "--seconds", "10"),
}


def bench(arguments: argparse.Namespace) -> int:
    """1 where a run failed or had a wrong result; the report is written all the same, of what there is."""
    begin = time.monotonic()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, options in RUNS.items():
        # A record of an earlier run must not pass for this one's.
        (out / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks", "run", *options, "--size", "small", "--record", str(out / name)]
        if subprocess.run([*command, *_threads(arguments)], cwd=ROOT, check=False).returncode:
            failed.append(name)
    records = [str(path) for name in RUNS if (path := out / f"{name}.json").is_file()]
    if records:
        command = [sys.executable, "-m", "benchmarks", "report", *records, "--out", str(out)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append("report")
    minutes = (time.monotonic() - begin) / 60
    if failed:
        print(f"FAILED: {', '.join(failed)}; see above", file=sys.stderr)
    print(f"{minutes:.1f} minutes. The page: {out / 'report.html'}" if records else "no record, so no report")
    return 1 if failed or not records else 0


def _threads(arguments: argparse.Namespace) -> list[str]:
    return ["--threads", str(arguments.threads)] if arguments.threads else []


def add_bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("bench", help="every operator and DreamLLM's workloads, small, with a report")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the records and the report")
    command.add_argument("--threads", type=int)
    command.set_defaults(run=bench)
