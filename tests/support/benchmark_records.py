"""Small benchmark records for tests, with random times."""

import copy
import random

SETTINGS = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_MAX_": "0"}


def make_record(seed=0, spread=1.02, operators=("rms_norm", "swiglu")):
    """A record as `python -m benchmarks run --record` writes it: two cases of each operator, three contenders."""
    draw = random.Random(seed)
    cases = []
    for operator in operators:
        for label in ("forward [8, 64]", "forward+backward [8, 64]"):
            ours = draw.uniform(20, 900)
            times = {"ours": ours, "eager": ours * draw.uniform(1.5, 9), "torch.compile": ours * draw.uniform(0.6, 3)}
            cases.append(
                {
                    "operator": operator,
                    "case": label,
                    "device": "cpu",
                    "caches": "warm",
                    "bytes_moved": draw.randrange(10**4, 10**7),
                    "flops": draw.randrange(10**4, 10**9),
                    "copy_minimum_us": round(ours * draw.uniform(0.3, 1.1), 2),
                    "contenders": {
                        name: {"minimum_us": round(time, 2), "median_us": round(time * spread, 2)}
                        for name, time in times.items()
                    },
                }
            )
    return {
        "date": "2026-01-02",
        "commit": "abc1234",
        "device": "cpu",
        "devices": {"cpu": "A processor, 2 threads", "cpu_isa": "avx2", "cuda": []},
        "versions": {"torch": "2.13.0"},
        "threads": 2,
        "settings": SETTINGS,
        "cases": cases,
        "boundary_us": {"rms_norm": {"rms_norm": 3.25, "eager": 14.5}},
    }


def scaled(record, factor, contender="ours", operator=None):
    """A copy in which a contender takes `factor` times as long, everywhere or in one operator."""
    changed = copy.deepcopy(record)
    for case in changed["cases"]:
        if operator in (None, case["operator"]):
            for name in case["contenders"][contender]:
                case["contenders"][contender][name] *= factor
    return changed
