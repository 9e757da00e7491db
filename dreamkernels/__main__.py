"""`python -m dreamkernels info`, `python -m dreamkernels report` and `python -m dreamkernels tune`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from dreamkernels import information
from dreamkernels.devices import ARCHITECTURES
from dreamkernels.tuning import command


def _info(arguments: argparse.Namespace) -> int:
    facts = information.collect()
    print(json.dumps(facts, indent=2) if arguments.json else information.as_text(facts))
    return 0


def _progress(architecture: str):
    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rcompiling for {architecture}: {done} of {total} kernels", end=end, file=sys.stderr, flush=True)

    return show


def _report(arguments: argparse.Namespace) -> int:
    import triton

    from dreamkernels import report
    from dreamkernels.report.text import as_prediction, as_table

    failed = False
    reports = {}
    for architecture in [arguments.arch] if arguments.arch else ARCHITECTURES:
        rows = report.report_kernels(architecture, _progress(architecture), arguments.predict)
        if arguments.save_baseline:
            path = report.save_baseline(
                architecture, rows, {"triton": triton.__version__, **information.nvcc_version()}
            )
            print(f"recorded {len(rows)} kernels in {path.name}", file=sys.stderr)
        baseline = report.load_baseline(architecture)
        problems = [problem for row in rows for problem in report.compare_with_baseline(row, baseline)]
        reports[architecture] = [dataclasses.asdict(row) for row in rows]
        if not arguments.json:
            print(as_table(architecture, rows, problems))
            if arguments.predict:
                print(as_prediction(architecture, rows))
        failed = failed or bool(problems)
    if arguments.json:
        print(json.dumps(reports, indent=2))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dreamkernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, devices, libraries and what each operator supports here")
    info.add_argument("--json", action="store_true", help="machine-readable")
    info.set_defaults(run=_info)
    report = commands.add_parser(
        "report", help="compile every GPU kernel without a GPU: registers, spills, occupancy, width of loads and stores"
    )
    report.add_argument("--arch", choices=ARCHITECTURES, help="one architecture; default: all")
    report.add_argument("--json", action="store_true", help="machine-readable")
    report.add_argument(
        "--save-baseline", action="store_true", help="record the result as what later ones are compared with"
    )
    report.add_argument(
        "--predict",
        action="store_true",
        help="also replay the main loops of tensor-core kernels in a model of the multiprocessor, which was never "
        "validated on a GPU, and print the order it expects",
    )
    report.set_defaults(run=_report)
    tune = commands.add_parser("tune", help="measure launch parameters on this GPU and keep the best for later calls")
    command.add_arguments(tune)
    tune.set_defaults(run=command.run)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
