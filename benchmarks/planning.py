"""How well `dreamllm plan` predicts steps of the mini model on this processor: `python -m benchmarks.planning`.

Operators are recorded in one step of stage II. From these records alone, steps of other stages and other batch sizes
are predicted, then run and timed. Only the ratios mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from dreamllm.planning.devices import find_device
from dreamllm.planning.estimate import operators_time
from dreamllm.planning.records import Records, records_from
from dreamllm.profiling import Recording, Repetitions, as_fake, device_name, prepare
from dreamllm.profiling.workload import Precision
from dreamllm.training import stage_batches
from dreamllm.workloads import make_processor, stage_config

RESULT = Path(__file__).parent / "results" / "plan-cpu.json"
CALIBRATION = ("stage2", 8)
HELD_OUT = (("stage2", 4), ("stage2", 12), ("stage1", 8), ("stage1", 24), ("stage3", 6))
SIZE = "mini"


def predicted_seconds(workload: str, documents: int, precision: Precision, records: Records) -> float:
    """From a step on tensors without contents and the records."""
    config = stage_config(workload, SIZE, documents)
    batch = stage_batches(config, make_processor(SIZE))[0].batch.to("cpu")
    step = prepare(SIZE, config, precision, fake=True)
    recording = step.record(as_fake(batch, step), batch.cu_seqlens.diff().tolist(), timed=False)
    return operators_time(recording.operators, find_device("cpu", records), records).seconds


class Timed:
    """A step whose repetitions are timed."""

    def __init__(self, workload: str, documents: int, precision: Precision) -> None:
        config = stage_config(workload, SIZE, documents)
        self.batch = stage_batches(config, make_processor(SIZE))[0].batch.to("cpu")
        self.step = prepare(SIZE, config, precision)
        self.step.run([self.batch])
        self.seconds: list[float] = []

    def run(self) -> None:
        begin = time.perf_counter()
        self.step.run([self.batch])
        self.seconds.append(time.perf_counter() - begin)

    def record(self) -> Recording:
        return self.step.record(self.batch, self.batch.cu_seqlens.diff().tolist(), timed=True)


def check(precision: Precision, steps: int) -> dict:
    """Measures, calibrates and predicts; prints one line per held-out step.

    Of every round each step runs once: a shared machine is faster and slower for seconds at a time, and what is
    compared must have seen the same.
    """
    calibration = Timed(*CALIBRATION, precision)
    held_out = [Timed(*each, precision) for each in HELD_OUT]
    repetitions = Repetitions()
    for _ in range(steps):
        for timed in (*held_out, calibration):  # which is recorded next
            timed.run()
        repetitions.add(calibration.seconds[-1], calibration.record())
    records = records_from("cpu", repetitions.recording.operators, repetitions.unattributed_seconds)
    rows = []
    for (workload, documents), timed in zip(HELD_OUT, held_out, strict=True):
        expected, found = predicted_seconds(workload, documents, precision, records), min(timed.seconds)
        error = expected / found - 1
        rows.append(
            {
                "workload": workload,
                "documents": documents,
                "predicted_ms": round(1e3 * expected, 1),
                "measured_ms": round(1e3 * found, 1),
                "error": round(error, 3),
            }
        )
        print(f"{precision:9} {workload:7} {documents:3} documents: predicted {1e3 * expected:7.1f} ms, "
              f"measured {1e3 * found:7.1f} ms, {100 * error:+.0f}%", flush=True)  # fmt: skip
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": SIZE,
        "calibration": {"workload": CALIBRATION[0], "documents": CALIBRATION[1]},
        "largest_error": max(abs(row["error"]) for row in rows),
        "steps": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--steps", type=int, default=7, help="of which the least counts, when calibrating and when measuring"
    )
    parser.add_argument("--record", action="store_true", help=f"write the figures into {RESULT.name}")
    options = parser.parse_args()
    result = check(options.precision, options.steps)
    print(f"largest error {100 * result['largest_error']:.0f}%")
    if options.record:
        stored = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
        RESULT.write_text(json.dumps({**stored, options.precision: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
