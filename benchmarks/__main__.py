"""`python -m benchmarks run [name or family ...]`: times operators and models, prints tables, can record them.

`bench`: a quick run of everything with its report. What was recorded: `report` (Markdown and a page), `compare A B`,
`gate RECORD --against BASELINE`.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import running
from benchmarks.quick import add_bench
from benchmarks.reporting.commands import add_commands


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    running.add_run(commands)
    add_bench(commands)
    add_commands(commands)
    arguments = parser.parse_args()
    if arguments.run is running.run:
        running.restart_with_settings(arguments)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
