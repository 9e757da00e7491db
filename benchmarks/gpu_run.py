"""Everything worth knowing from a GPU, in one call: `python benchmarks/gpu_run.py --minutes 9 --out DIR`.

Builds both libraries, runs the GPU tests, times every operator briefly, tunes launch parameters, then runs DreamLLM at
7b beside the original's pattern, the whole suite and other models: the most valuable first, each step a process of its
own with a limit of time, each recorded in DIR as soon as it ends. A step that fails stops no other. The same call again
goes on where the time ended. Needs no network: `--wheels` names a folder of wheels for what the machine lacks (pytest,
pybind11, ninja, ...). Where nvcc is missing, a `_cuda.abi3.so` that was carried in dreamkernels/ is used; `--prebuilt`
uses all carried libraries and builds nothing. `--archive FILE` also packs DIR into one file, for machines from which
only a few files come back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu_run_site"  # where --wheels go
PARTS = ("facts", "build", "tests", "smoke", "tune", "workloads", "suite", "models")
FINISHED = ("passed", "failed", "too long")
LEAST_SECONDS = 5.0  # with less left no step is begun
NO_TESTS = 5  # pytest's code
OUT_OF_TIME = 3  # the code of a command that ended early by itself, and of this one
MODELS = ("diffusion_unet", "sampling", "llama_training_step")
# What the names of dreamllm's cases begin with, after the size: each a process, so that a call can end between them.
WORKLOADS = ("stage2", "creation", "comprehension", "text_to_image", "captioning", "stage3", "candidates")
ENGINE = "inference"
SIZES = {"small": "mini", "working": "7b"}  # of dreamllm.workloads


@dataclass(frozen=True)
class Step:
    """One command. `{minutes}` in it becomes what is left for it, so that it can end in time by itself; such a command
    goes on in the next call where it ended."""

    part: str
    name: str
    command: tuple[str, ...]
    minutes: float  # a step that takes longer is ended and counts as done
    environment: dict[str, str] = field(default_factory=dict)
    good_codes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Setting:
    out: Path
    device: str = "cuda"
    size: str = "working"
    wheels: Path | None = None
    prebuilt: bool = False


def _pytest(setting: Setting, file: Path) -> tuple[str, ...]:
    # Without the project's own settings: their options come from plugins that a bare machine lacks.
    name = file.stem
    chosen = ("-m", "gpu") if setting.device == "cuda" else ("-m", "not gpu and not slow")
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull)
    junit = setting.out / "tests" / f"{name}.xml"
    paths = (f"--rootdir={ROOT}", "-o", f"pythonpath={ROOT}", f"--junitxml={junit}", str(file))
    return (sys.executable, "-m", "pytest", *options, *chosen, *paths)


def _test_files(setting: Setting) -> list[Path]:
    if setting.size == "small":
        return [ROOT / "tests" / "ops" / "test_softmax_groups.py"]
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [file for file in files if "mark.gpu" in file.read_text()]
    # The operators' own tests say most.
    return sorted(found, key=lambda file: file.parent.name != "ops")


def _build(setting: Setting) -> list[Step]:
    python = sys.executable
    steps = []
    if setting.wheels:
        pip = ("-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE))
        wheels = tuple(str(path) for path in sorted(setting.wheels.glob("*.whl")))
        steps.append(Step("build", "wheels", (python, *pip, *wheels), 2))
    environment = {} if setting.device == "cuda" else {"DREAMKERNELS_BUILD_CUDA": "0"}
    if not setting.prebuilt:
        steps.append(Step("build", "compile", (python, "setup.py", "build_ext", "--inplace"), 6, environment))
    # What matters is not that something was compiled but that it loads.
    steps.append(Step("build", "libraries", (python, "-m", "benchmarks.gpu_libraries", setting.device), 1))
    return [*steps, Step("build", "info", (python, "-m", "dreamkernels", "info", "--json"), 1)]


def _benchmark(setting: Setting, part: str, name: str, minutes: float, *more: str, step: str = "") -> Step:
    step = step or name
    seconds = "0.1" if setting.size == "small" else "1"
    record = str((setting.out / part / step).resolve())
    options = ("--device", setting.device, "--size", setting.size, "--seconds", seconds, "--record", record, *more)
    return Step(part, step, (sys.executable, "-m", "benchmarks", "run", name, "--exactly", *options), minutes)


def _workload(setting: Setting, name: str) -> Step:
    """Cases of DreamLLM. Without their compiled variants: those compile for longer than a call lasts."""
    only = f"{SIZES[setting.size]} {name}"
    return _benchmark(setting, "workloads", "dreamllm", 3, "--only", only, "--no-compile", step=name)


def _suite(setting: Setting) -> list[Step]:
    if setting.size == "small":
        return [_benchmark(setting, "suite", "append_kv", 2)]
    names = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "ops").glob("bench_*.py"))
    return [_benchmark(setting, "suite", name, 3) for name in names]


def _models(setting: Setting) -> list[Step]:
    size, precision = ("tiny", "float32") if setting.size == "small" else ("mini", "bfloat16")
    out = str(setting.out / "models" / "profile")
    options = ("--size", size, "--precision", precision, "--device", setting.device, "--out", out)
    profile = Step("models", "profile", (sys.executable, "-m", "dreamllm", "profile", *options), 2)
    if setting.size == "small":
        return [profile]
    engine = _benchmark(setting, "models", ENGINE, 4, "--no-compile")
    return [profile, engine, *(_benchmark(setting, "models", name, 4) for name in MODELS)]


def steps_of(part: str, setting: Setting) -> list[Step]:
    """The commands of one of PARTS, in order."""
    python, out = sys.executable, setting.out
    if part == "facts":
        return [Step("facts", "device", (python, "-m", "benchmarks.gpu_facts", str(out / "facts" / "device.json")), 1)]
    if part == "build":
        return _build(setting)
    if part == "tests":
        return [Step("tests", f.stem, _pytest(setting, f), 4, good_codes=(0, NO_TESTS)) for f in _test_files(setting)]
    if part == "smoke":
        names = ("append_kv",) if setting.size == "small" else ()
        options = ("--device", setting.device, "--size", setting.size, "--record", str(out / "smoke" / "smoke.json"))
        return [Step("smoke", "operators", (python, "-m", "benchmarks.smoke", *names, *options), 3)]
    if part == "tune":
        if setting.device != "cuda":
            return []
        options = ("--minutes", "{minutes}", "--out", str(out / "tune" / "tuned.json"))
        # A part of every call, since the suite is wanted, too.
        return [Step("tune", "launch", (python, "-m", "dreamkernels", "tune", *options), 4)]
    if part == "workloads":
        names = ("comprehension",) if setting.size == "small" else WORKLOADS
        return [_workload(setting, name) for name in names]
    if part == "suite":
        return _suite(setting)
    if part == "models":
        return _models(setting)
    raise ValueError(f"there is no part {part!r} ({', '.join(PARTS)})")


def commit() -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _result_file(out: Path, step: Step) -> Path:
    return out / step.part / f"{step.name}.step.json"


def earlier(out: Path, step: Step) -> dict | None:
    """What an earlier call recorded of a step that needs no second one."""
    try:
        result = json.loads(_result_file(out, step).read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("status") in FINISHED else None


def _environment(step: Step) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(SITE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", **step.environment}


def run_step(step: Step, out: Path, seconds_left: float) -> dict:
    """Runs a step and records it: passed, failed, too long (over its own limit) or cut (no time; to be repeated)."""
    limit = min(60 * step.minutes, seconds_left)
    goes_on = "{minutes}" in step.command
    # A command that minds its time gets a margin to end by itself.
    minutes = f"{max(limit - 20, limit / 2) / 60:.3f}"
    command = [word.replace("{minutes}", minutes) for word in step.command]
    log = out / step.part / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    code: int | None = None
    with log.open("a") as stream:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(step), stdout=stream, stderr=stream, start_new_session=True
            )
        except OSError as error:
            stream.write(f"{error}\n")
            status = "failed"
        else:
            try:
                code = process.wait(timeout=limit)
                good = "passed" if code in step.good_codes else "failed"
                status = "cut" if code == OUT_OF_TIME and goes_on else good
            except subprocess.TimeoutExpired:
                status = "cut" if goes_on or seconds_left < 60 * step.minutes else "too long"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with its compilers and workers
                    process.wait()
    result = {
        "part": step.part,
        "step": step.name,
        "status": status,
        "code": code,
        "seconds": round(time.monotonic() - begin, 1),
        "command": command,
        "commit": commit(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "last_lines": log.read_text(errors="replace").splitlines()[-15:],
    }
    unfinished = _result_file(out, step).with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(_result_file(out, step))
    return result


def failed_tests(junit: Path) -> list[str]:
    """One line for each failed test of a JUnit file."""
    try:
        cases = xml.etree.ElementTree.parse(junit).getroot().iter("testcase")
    except (OSError, xml.etree.ElementTree.ParseError):
        return []
    lines = []
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                reason = (found.get("message") or "").strip().splitlines() or [""]
                lines.append(f"{case.get('classname')}::{case.get('name')}: {reason[0][:160]}")
    return lines


def summary(results: list[dict], out: Path) -> str:
    """A short text: how each part ended, and what failed."""
    lines = []
    for part in dict.fromkeys(result["part"] for result in results):
        mine = [result for result in results if result["part"] == part]
        counts: dict[str, int] = {}
        for result in mine:
            counts[result["status"]] = counts.get(result["status"], 0) + 1
        said = ", ".join(f"{number} {status}" for status, number in counts.items())
        lines.append(f"{part:7} {said}  ({sum(result.get('seconds', 0) for result in mine):.0f} s)")
        for result in mine:
            if result["status"] in ("failed", "too long"):
                last = next((line for line in reversed(result["last_lines"]) if line.strip()), "")
                lines.append(f"  {result['step']}: {result['status']}: {last[:160]}")
                lines += [f"    {line}" for line in failed_tests(out / part / f"{result['step']}.xml")[:10]]
    commits = sorted({result["commit"] for result in results if "commit" in result})
    return "\n".join([*lines, f"commits: {', '.join(commits) or 'none'}"])


def run(steps: list[Step], out: Path, minutes: float, again: bool = False) -> list[dict]:
    """Runs the steps that no earlier call finished (all of them with `again`) until the time is over."""
    end = time.monotonic() + 60 * minutes
    results = []
    for step in steps:
        left = end - time.monotonic()
        if not again and (found := earlier(out, step)):
            result = found
        elif left < LEAST_SECONDS:
            result = {"part": step.part, "step": step.name, "status": "not begun", "last_lines": []}
        else:
            print(f"{step.part} {step.name} ...", end=" ", flush=True)
            result = run_step(step, out, left)
            print(f"{result['status']}, {result['seconds']} s", flush=True)
        results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of all results; the same again to go on")
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all, in this order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("working", "small"), default="working", help="small: to try this program")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install beside the repository first")
    parser.add_argument("--prebuilt", action="store_true", help="build nothing: the libraries were carried here")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="pack DIR into this .tar.gz at the end")
    parser.add_argument("--again", action="store_true", help="also what an earlier call finished")
    arguments = parser.parse_args()
    if not (arguments.minutes > 0 and math.isfinite(arguments.minutes)):
        parser.error(f"--minutes {arguments.minutes} is no time to run")
    if arguments.wheels and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels {arguments.wheels} holds no wheel")
    out = arguments.out.resolve()
    wheels = arguments.wheels.resolve() if arguments.wheels else None
    setting = Setting(out, arguments.device, arguments.size, wheels, arguments.prebuilt)
    parts = [part for part in PARTS if not arguments.part or part in arguments.part]
    out.mkdir(parents=True, exist_ok=True)
    steps = [step for part in parts for step in steps_of(part, setting)]
    for step in steps:
        (out / step.part).mkdir(exist_ok=True)
    results = run(steps, out, arguments.minutes, arguments.again)
    text = summary(results, out)
    (out / "summary.txt").write_text(text + "\n")
    if arguments.archive:
        with tarfile.open(arguments.archive, "w:gz") as archive:
            archive.add(out, arcname=out.name)
    print(f"\n{text}")
    statuses = {result["status"] for result in results}
    if statuses & {"failed", "too long"}:
        return 1
    return OUT_OF_TIME if statuses & {"cut", "not begun"} else 0


if __name__ == "__main__":
    sys.exit(main())
