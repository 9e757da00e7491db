"""The one call for a GPU machine, tried on the CPU: what is recorded, resumed, failed, and ended in time."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_libraries, gpu_run
from benchmarks.gpu_run import MODELS, PARTS, Setting, Step, run, steps_of, summary
from benchmarks.models import bench_dreamllm
from dreamkernels import libraries

ROOT = Path(__file__).parents[2]


def step(code: str, name: str = "one", part: str = "tests", minutes: float = 1.0, **options) -> Step:
    return Step(part, name, (sys.executable, "-c", code), minutes, **options)


def counting(out: Path, code: str = "pass") -> str:
    """Leaves one character in a file for every run."""
    return f"open({str(out / 'runs')!r}, 'a').write('x'); {code}"


def test_the_call_as_a_user_makes_it(tmp_path):
    command = [sys.executable, "benchmarks/gpu_run.py", "--device", "cpu", "--size", "small", "--minutes", "1"]
    command += ["--part", "facts", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads((tmp_path / "facts" / "device.json").read_text())
    assert facts["packages"]["torch"]
    assert facts["gpus"] == [] or facts["gpus"][0]["multiprocessors"] > 0
    assert "1 passed" in (tmp_path / "summary.txt").read_text()
    assert "1 passed" in ended.stdout.splitlines()[-2]
    before = (tmp_path / "facts" / "device.step.json").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "..." not in again.stdout  # nothing was run
    assert (tmp_path / "facts" / "device.step.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "painting"], "invalid choice"),
        (["--minutes", "0"], "is no time to run"),
        (["--wheels", "tests"], "holds no wheel"),
    ],
)
def test_wrong_arguments(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        gpu_run.main()
    assert said in capsys.readouterr().err


def test_a_failed_step_stops_no_other_and_says_why(tmp_path):
    steps = [
        step("print('half'); raise SystemExit('the kernel is broken')", "bad"),
        Step("tests", "missing", ("/no/such/program",), 1),
        step("print('fine')", "good", "suite"),
    ]
    results = run(steps, tmp_path, 1)
    assert [result["status"] for result in results] == ["failed", "failed", "passed"]
    assert "the kernel is broken" in (tmp_path / "tests" / "bad.log").read_text()
    text = summary(results, tmp_path)
    assert "tests   2 failed" in text
    assert "bad: failed: the kernel is broken" in text
    assert "suite   1 passed" in text


def test_each_result_is_there_as_soon_as_its_step_has_ended(tmp_path):
    first = tmp_path / "tests" / "one.step.json"
    code = f"import os, sys; sys.exit(0 if os.path.exists({str(first)!r}) else 9)"
    results = run([step("pass"), step(code, "two")], tmp_path, 1)
    assert [result["code"] for result in results] == [0, 0]
    assert json.loads(first.read_text())["command"][0] == sys.executable


def test_a_second_call_runs_only_what_is_missing(tmp_path):
    done, failed = step(counting(tmp_path)), step(counting(tmp_path, "raise SystemExit(2)"), "two")
    run([done], tmp_path, 1)
    results = run([done, failed], tmp_path, 1)
    assert [result["status"] for result in results] == ["passed", "failed"]
    run([done, failed], tmp_path, 1)
    assert (tmp_path / "runs").read_text() == "xx"
    run([done, failed], tmp_path, 1, again=True)
    assert (tmp_path / "runs").read_text() == "xxxx"
    (tmp_path / "tests" / "one.step.json").write_text("{ half")
    run([done, failed], tmp_path, 1)
    assert (tmp_path / "runs").read_text() == "xxxxx"


def test_a_step_over_its_own_limit_is_ended_with_its_children_and_not_repeated(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = counting(
        tmp_path, f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    slow = step(code, minutes=0.5 / 60)
    assert [result["status"] for result in run([slow, step("pass", "two")], tmp_path, 1)] == ["too long", "passed"]
    assert run([slow], tmp_path, 1)[0]["status"] == "too long"
    assert (tmp_path / "runs").read_text() == "x"
    time.sleep(2.2)
    assert not (tmp_path / "alive").exists()


def test_the_deadline_cuts_a_step_which_the_next_call_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LEAST_SECONDS", 0.2)
    waiting = tmp_path / "wait"
    waiting.touch()
    code = f"import os, time; time.sleep(60 if os.path.exists({str(waiting)!r}) else 0)"
    steps = [step(code), step("pass", "two")]
    results = run(steps, tmp_path, 1 / 60)
    assert [result["status"] for result in results] == ["cut", "not begun"]
    assert "1 cut, 1 not begun" in summary(results, tmp_path)
    waiting.unlink()
    assert [result["status"] for result in run(steps, tmp_path, 1)] == ["passed", "passed"]


def test_a_command_that_minds_its_time_hears_it_and_is_repeated(tmp_path):
    code = "import sys; minutes = float(sys.argv[1]); sys.exit(3 if 0 < minutes < 0.7 else 9)"
    minding = Step("tune", "launch", (sys.executable, "-c", code, "{minutes}"), 1)
    assert run([minding], tmp_path, 5)[0]["status"] == "cut"
    assert run([minding], tmp_path, 5)[0]["status"] == "cut"
    late = Step("tune", "late", (sys.executable, "-c", "import time; time.sleep(60)", "{minutes}"), 0.5 / 60)
    assert run([late], tmp_path, 5)[0]["status"] == "cut"  # over its limit, but what it stored is not lost
    assert run([step("raise SystemExit(3)")], tmp_path, 5)[0]["status"] == "failed"  # a code like any other


def test_failed_tests_are_named(tmp_path):
    file = tmp_path / "test_of_mine.py"
    file.write_text("def test_wrong():\n    assert 1 == 2, 'numbers differ'\n\ndef test_right():\n    pass\n")
    command = gpu_run._pytest(Setting(tmp_path, "cpu", "small"), file)
    results = run([Step("tests", "test_of_mine", command, 1, good_codes=(0, 5))], tmp_path, 1)
    text = summary(results, tmp_path)
    assert "test_wrong: AssertionError: numbers differ" in text
    assert "test_right" not in text


def test_the_most_valuable_comes_first_and_nothing_is_left_out(tmp_path):
    steps = {part: steps_of(part, Setting(tmp_path)) for part in PARTS}
    assert list(steps) == ["facts", "build", "tests", "smoke", "tune", "workloads", "suite", "models"]
    assert all(steps.values())
    assert steps["tests"][0].name.startswith("test_")
    marked = {path.stem for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()}
    assert {s.name for s in steps["tests"]} == marked
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "ops").glob("bench_*.py")}
    assert {s.name for s in steps["suite"]} == benchmarks
    names = [(s.part, s.name) for part in steps.values() for s in part]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="no part 'painting'"):
        steps_of("painting", Setting(tmp_path))


@pytest.mark.parametrize("size", ["small", "working"])
def test_every_case_of_dreamllm_at_7b_is_in_one_step(size, tmp_path):
    setting = Setting(tmp_path, "cuda", size)
    steps = steps_of("workloads", setting)
    wanted = [step.command[step.command.index("--only") + 1] for step in steps]
    assert all("--no-compile" in step.command for step in steps)
    cases = [case.name for case in bench_dreamllm.cases("cuda", size)]
    matches = [sum(text in case for text in wanted) for case in cases]
    assert matches == [1] * len(cases) if size == "working" else sum(matches) == 1
    assert all(any(text in case for case in cases) for text in wanted)
    names = {step.command[4] for step in steps_of("models", setting) if step.command[3] == "run"}
    assert names == ({"inference", *MODELS} if size == "working" else set())


@pytest.mark.slow
def test_a_workload_is_run_recorded_and_not_repeated(tmp_path):
    steps = steps_of("workloads", Setting(tmp_path, "cpu", "small"))
    (result,) = run(steps, tmp_path, 3)
    assert result["status"] == "passed", result["last_lines"]
    record = json.loads((tmp_path / "workloads" / "comprehension.json").read_text())
    assert [case["operator"] for case in record["cases"]] == ["mini stage1_comprehension"]
    assert list(record["cases"][0]["contenders"]) == ["dreamllm", "original pattern"]
    log = (tmp_path / "workloads" / "comprehension.log").read_text()
    assert run(steps, tmp_path, 3)[0] == result
    assert (tmp_path / "workloads" / "comprehension.log").read_text() == log


def test_carried_libraries_are_only_loaded(tmp_path):
    built = [step.name for step in steps_of("build", Setting(tmp_path))]
    assert built == ["compile", "libraries", "info"]
    carried = steps_of("build", Setting(tmp_path, "cpu", "small", prebuilt=True))
    assert [step.name for step in carried] == ["libraries", "info"]
    assert run(carried[:1], tmp_path, 1)[0]["status"] == "passed"
    assert "_cpu: loaded" in (tmp_path / "build" / "libraries.log").read_text()


@pytest.mark.parametrize(("device", "missing"), [("cpu", ["_cpu"]), ("cuda", ["_cpu", "_cuda"])])
def test_a_library_that_does_not_load_is_a_failed_step(device, missing, monkeypatch, capsys):
    broken = {name: libraries.Library(name, "", "slower", error="GLIBC_2.39 not found") for name in ("_cpu", "_cuda")}
    monkeypatch.setattr(libraries, "LOADED", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_libraries", device])
    assert gpu_libraries.main() == 1
    out = capsys.readouterr().out
    assert "_cpu: MISSING, GLIBC_2.39 not found; slower" in out
    assert out.splitlines()[-1] == f"missing: {', '.join(missing)}"


def test_everything_in_one_file(tmp_path, monkeypatch):
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    arguments = ["--out", str(out), "--part", "facts", "--device", "cpu", "--archive", str(archive), "--minutes", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", *arguments])
    assert gpu_run.main() == 0
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert {"out/summary.txt", "out/facts/device.json", "out/facts/device.step.json"} <= set(names)


def test_wheels_are_installed_without_a_network(tmp_path):
    (tmp_path / "a-1-py3-none-any.whl").touch()
    first = steps_of("build", Setting(tmp_path / "out", wheels=tmp_path))[0]
    assert "--no-index" in first.command
    assert first.command[-1].endswith("a-1-py3-none-any.whl")
    assert str(gpu_run.SITE) in gpu_run._environment(first)["PYTHONPATH"]
