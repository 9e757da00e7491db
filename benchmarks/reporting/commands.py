"""`python -m benchmarks report`, `compare` and `gate`. None of them measures anything."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.reporting import instructions
from benchmarks.reporting.changes import compare_text, gate
from benchmarks.reporting.records import RESULTS, find_record, load_record


def add_commands(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("report", help="records as Markdown and as one self-contained HTML page")
    command.add_argument("records", nargs="*", help="files, or names in benchmarks/results; default: all of them")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for report.md and report.html")
    command.set_defaults(run=run_report)
    command = commands.add_parser("compare", help="two records: B / A of every contender of every case")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.set_defaults(run=run_compare)
    command = commands.add_parser(
        "gate", help="exit with 1 where a ratio to eager became worse than in a baseline by more than the noise"
    )
    command.add_argument("record", metavar="RECORD", nargs="?")
    command.add_argument(
        "--against", metavar="BASELINE", nargs="+", help="one record, or better several runs of the same commit"
    )
    command.add_argument(
        "--instructions",
        action="store_true",
        help="count those of some CPU kernels with callgrind and compare (minutes)",
    )
    command.add_argument("--save-instructions", action="store_true", help="count them and record them as the baseline")
    command.set_defaults(run=run_gate)


def run_report(arguments: argparse.Namespace) -> int:
    try:
        paths, skipped = [find_record(name) for name in arguments.records], []
        if not paths:
            paths, skipped = all_records()
        if not paths:
            return _unusable("benchmarks/results has no record; write one with: python -m benchmarks run --record NAME")
        from benchmarks.reporting.report import write_report  # the page's style comes with all of dreamllm

        for path in write_report(paths, arguments.out, skipped):
            print(path)
    except (ValueError, OSError) as error:
        return _unusable(error)
    return 0


def all_records() -> tuple[list[Path], list[str]]:
    """Those in benchmarks/results, and a sentence for each file there that is something else."""
    paths, skipped = [], []
    for path in sorted(RESULTS.glob("*.json")):
        problem = _problem(path)
        if problem is None:
            paths.append(path)
        else:
            skipped.append(f"Left out: {problem}.")
    return paths, skipped


def _problem(path: Path) -> str | None:
    try:
        load_record(path)
    except ValueError as error:
        return str(error)
    return None


def run_compare(arguments: argparse.Namespace) -> int:
    try:
        print(compare_text(load_record(arguments.a), load_record(arguments.b)))
    except (ValueError, OSError) as error:
        return _unusable(error)
    return 0


def run_gate(arguments: argparse.Namespace) -> int:
    counting = arguments.instructions or arguments.save_instructions
    if (arguments.record is None) != (arguments.against is None) or not (arguments.record or counting):
        return _unusable("gate needs RECORD and --against BASELINE, or --instructions, or both")
    try:
        passed = True
        if arguments.record:
            passed, text = gate(load_record(arguments.record), *map(load_record, arguments.against))
            print(text)
        if counting:
            found = instructions.measure_instructions()
            if arguments.save_instructions:
                instructions.save_baseline(found)
            baseline = json.loads(instructions.BASELINE.read_text(encoding="utf-8"))
            same, text = instructions.compare_instructions(found, baseline)
            print(text)
            passed &= same
    except (ValueError, OSError, RuntimeError) as error:
        return _unusable(error)
    return 0 if passed else 1


def _unusable(reason: object) -> int:
    print(reason, file=sys.stderr)
    return 2
