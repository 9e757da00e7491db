"""One small and quick case of every operator beside eager PyTorch: `python -m benchmarks.smoke`.

It says whether each operator runs and agrees here, and roughly how fast; the suite (`python -m benchmarks run`) says
how fast. What torch.compile would add is left out, since it compiles longer than everything here takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import SIZES, Case, measure
from benchmarks.running import available, git_commit


def pick(cases: list[Case]) -> Case:
    """The least case, without the contenders that compile."""
    case = min(cases, key=lambda case: case.bytes_moved + case.flops / 64)
    return dataclasses.replace(case.without_compiled(), memory=False)


def operators() -> list[str]:
    return [name for name, path in available().items() if path.startswith("benchmarks.ops.")]


def smoke(names: list[str], device: str, size: str, seconds: float) -> dict[str, Any]:
    """Results by operator; one that fails leaves its error and does not stop the others."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            module = importlib.import_module(available()[name])
            result = measure(pick(list(module.cases(device, size))), rounds=20, seconds=seconds)
            found[name] = result.record()
            ours = result.timings[0]
            others = ", ".join(
                f"{t.minimum_us / ours.minimum_us:.2f}x as fast as {t.contender}" for t in result.timings[1:]
            )
            print(f"{name:22} {result.case.label:48} {ours.minimum_us:10.1f} us  {others}", flush=True)
        except Exception as error:  # noqa: PERF203 - the next operator may well run
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name:22} FAILED: {found[name]['error'].splitlines()[0]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: all ({', '.join(operators())})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=0.5, help="per operator")
    parser.add_argument("--record", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in operators()]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; operators: {', '.join(operators())}")
    torch.manual_seed(0)
    found = smoke(arguments.names or operators(), arguments.device, arguments.size, arguments.seconds)
    if arguments.record:
        content = {"device": arguments.device, "torch": torch.__version__, "commit": git_commit(), "operators": found}
        arguments.record.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any("error" in result for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
