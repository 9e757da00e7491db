"""All benchmarks by name."""

from __future__ import annotations

import difflib

from dreamllm.evaluation.benchmarks import captions, creation, language, mmbench, mmvet, pope, vqa
from dreamllm.evaluation.benchmarks.base import Benchmark, DigitsBenchmark

DIGITS = DigitsBenchmark("digits", "Scanned digits", "accuracy", "unseen scans and drawn digits", ())
FAMILIES: tuple[tuple[Benchmark, ...], ...] = (
    captions.BENCHMARKS,
    vqa.BENCHMARKS,
    pope.BENCHMARKS,
    mmbench.BENCHMARKS,
    mmvet.BENCHMARKS,
    creation.BENCHMARKS,
    language.BENCHMARKS,
    (DIGITS,),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for family in FAMILIES for benchmark in family}


def find_benchmark(name: str) -> Benchmark:
    """Raises `ValueError` listing the known names, the nearest first."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown benchmark {name!r}.{meant} Known: {', '.join(BENCHMARKS)}")
