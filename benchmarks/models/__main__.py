"""`python -m benchmarks.models [workload ...]`: DreamLLM's workloads against the original's pattern, per sample.

The same cases as `python -m benchmarks run dreamllm inference`, which records them, with a table that counts samples,
and any size.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.running import KEEP_FREED_MEMORY
from benchmarks.running import SETTINGS as THREAD_SETTINGS

SETTINGS = THREAD_SETTINGS | KEEP_FREED_MEMORY


def main() -> int:
    import torch

    from benchmarks.harness import measure
    from benchmarks.models.costs import costs
    from benchmarks.models.inference import inference_workloads
    from benchmarks.models.setting import Setting
    from benchmarks.models.workloads import OURS, workloads

    known = workloads(Setting("mini")) | inference_workloads(Setting("mini"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="workload", help=f"default: all ({', '.join(known)})")
    parser.add_argument("--size", choices=("tiny", "mini", "7b"), default="mini", help="7b in bfloat16; needs a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help="of the decoder, where not all of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--compile", action="store_true", help="also the pattern under torch.compile (minutes)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"unknown workloads: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU here")
    torch.set_num_threads(arguments.threads)
    setting = Setting.usual(arguments.size, arguments.device).with_layers(arguments.layers)
    shares = {part: f"{share:.0%}" for part, share in costs(arguments.size).share_of_pair(arguments.size).items()}
    print(f"{arguments.size}, {arguments.threads} threads; shares of a pair's operations: {shares}")
    every = workloads(setting, arguments.compile) | inference_workloads(setting)
    for name, make in every.items():
        if not arguments.names or name in arguments.names:
            print_result(name, measure(make(), rounds=arguments.rounds), OURS)
    return 0


def print_result(name: str, result, ours: str) -> None:
    print(f"\n{name}: {result.case.label}")
    mine = result.seconds_per_sample(ours)
    for timing in result.timings:
        seconds = result.seconds_per_sample(timing.contender)
        ratio = "" if timing.contender == ours else f"   {ours} is {seconds / mine:.2f}x as fast"
        memory = result.peak_extra_bytes.get(timing.contender)
        if memory is not None:
            ratio += f"   peak {memory / 2**20:.0f} MiB"
        print(f"  {timing.contender:32} {seconds * 1e3:9.1f} ms/sample {1 / seconds:9.2f} samples/s{ratio}")
    for contender, reason in result.failures.items():
        print(f"  {contender:32} failed: {reason}")
    sys.stdout.flush()


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.models", *sys.argv[1:]], {**os.environ, **SETTINGS}
        )
    sys.exit(main())
