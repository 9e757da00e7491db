"""Instructions that CPU kernels execute for a fixed workload, counted by callgrind: they do not depend on the load.

Counted are the instructions inside dreamkernels' CPU library during one call of each operator, on one thread, with the
AVX2 kernels, since valgrind knows no AVX-512. They depend on the compiler, so the baseline names the one it was made
with. Importing torch under valgrind takes a minute or two.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BASELINE = Path(__file__).resolve().parent / "instructions_avx2.json"
TOLERANCE = 0.02
LIBRARY = re.compile(r"/dreamkernels/_cpu\.[^/]*$")
NAMED = re.compile(r"c?ob=\((\d+)\)(?: (.*))?$")


def count_instructions(lines: Iterable[str]) -> int:
    """Instructions inside the library, without those of what it calls, in one dump of callgrind."""
    names: dict[str, str] = {}
    total, inside, callee = 0, False, False
    for line in lines:
        if named := NAMED.match(line.rstrip("\n")):
            number, name = named.groups()
            if name:
                names[number] = name
            if line.startswith("ob="):
                inside = bool(LIBRARY.search(names.get(number, "")))
        elif line.startswith("calls="):
            callee = True  # the next line of costs is the callee's
        elif line[:1] in "0123456789+-*" and line[:1]:
            total += int(line.split()[1]) if inside and not callee else 0
            callee = False
    return total


def measure_instructions() -> dict[str, Any]:
    """Runs the workload under callgrind. Raises RuntimeError saying what is missing or what failed."""
    if not shutil.which("valgrind") or not shutil.which("callgrind_control"):
        raise RuntimeError("counting instructions needs valgrind (Debian: apt install valgrind)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable, "-m", __name__]
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if run.returncode:
            raise RuntimeError(f"the workload failed under valgrind:\n{run.stderr[-2000:]}")
        facts = json.loads(run.stdout.splitlines()[-1])
        counts = {}
        for part in Path(folder).glob("counts.*"):
            with part.open() as lines:
                text = lines.readlines()
            trigger = next((line.split()[-1] for line in text if line.startswith("desc: Trigger: dump ")), "")
            if trigger in facts["operators"]:
                counts[trigger] = count_instructions(text)
    missing = [name for name in facts["operators"] if not counts.get(name)]
    if missing:
        raise RuntimeError(f"callgrind counted nothing in the CPU library for: {', '.join(missing)}")
    return {"compiler": facts["compiler"], "counts": {name: counts[name] for name in facts["operators"]}}


def compare_instructions(found: dict[str, Any], baseline: dict[str, Any]) -> tuple[bool, str]:
    """Whether no count exceeds the baseline's by more than TOLERANCE, and a line for each.

    Raises ValueError where another compiler made the baseline.
    """
    if found["compiler"] != baseline["compiler"]:
        raise ValueError(f"instruction counts were recorded with {baseline['compiler']}, this build is by "
                         f"{found['compiler']}; record anew with --save-instructions")  # fmt: skip
    lines, passed = [], True
    for name in sorted({*found["counts"], *baseline["counts"]}):
        now, then = found["counts"].get(name), baseline["counts"].get(name)
        if now is None or then is None:
            verdict, passed = "only in the baseline" if now is None else "not in the baseline", False
            lines.append(f"{name}: {verdict}")
            continue
        worse = now > then * (1 + TOLERANCE)
        passed &= not worse
        lines.append(f"{'worse: ' if worse else ''}{name}: {now:,} instructions, recorded {then:,} "
                     f"({100 * (now / then - 1):+.2f}%)")  # fmt: skip
    return passed, "\n".join([*lines, "passed" if passed else "FAILED"])


def save_baseline(found: dict[str, Any]) -> None:
    BASELINE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _workload() -> dict[str, Callable[[], object]]:
    import torch

    import dreamkernels

    x, weight = torch.linspace(-2, 2, 64 * 256).view(64, 256), torch.ones(256)
    half = x.bfloat16()
    return {
        "rms_norm": lambda: dreamkernels.rms_norm(x, weight),
        "rms_norm_bfloat16": lambda: dreamkernels.rms_norm(half, weight.bfloat16()),
        "layer_norm": lambda: dreamkernels.layer_norm(x, weight, weight),
        "swiglu": lambda: dreamkernels.swiglu(x, x),
        "geglu": lambda: dreamkernels.geglu(x),
    }


def _dump(name: str) -> None:
    subprocess.run(["callgrind_control", f"--dump={name}", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def run_workload() -> None:
    """In the process that callgrind watches: two calls of each operator, the second between two dumps."""
    import torch

    from dreamkernels import libraries

    torch.set_num_threads(1)
    libraries.set_cpu_isa("avx2")
    operators = _workload()
    for name, call in operators.items():
        call()  # a first call sets things up
        _dump("before")
        call()
        _dump(name)
    print(json.dumps({"operators": list(operators), "compiler": libraries.build_information()["compiler"]}))


if __name__ == "__main__":
    run_workload()
