"""The command runs what is asked for, goes on after what fails, and says so by its exit code."""

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import running
from benchmarks.__main__ import main
from benchmarks.harness import SIZES, Case, NotHereError, _tensors
from benchmarks.running import available, chosen, run

OPERATORS = [name for name, path in available().items() if path.startswith("benchmarks.ops.")]


@pytest.mark.parametrize("name", available())
def test_every_benchmark_has_both_sizes(name):
    module = chosen([name])[name]
    assert set(module.SHAPES) == set(SIZES)
    assert module.SHAPES["small"] != module.SHAPES["working"]


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"condition_kv", "cross_conditioning"}))  # those make weights
@pytest.mark.parametrize("size", SIZES)
def test_cases_declare_what_they_do(name, size):
    cases = list(chosen([name])[name].cases("cpu", size))
    assert len({(case.operator, case.label) for case in cases}) == len(cases)
    for case in cases:
        assert case.bytes_moved > 0
        assert len(case.contenders) > 1
        assert case.without_compiled().contenders.keys() <= case.contenders.keys()
        assert not any("compile" in contender for contender in case.without_compiled().contenders)


# The others ask tensors for values, which those without contents cannot tell.
WITHOUT_CONTENTS = sorted(
    set(OPERATORS)
    - {"attention", "decode_attention", "decode_layers", "guided_step", "linear_cross_entropy", "splice_embeddings"}
)


@pytest.mark.filterwarnings("ignore::dreamkernels.ops.operator.FallbackWarning")
@pytest.mark.parametrize("name", WITHOUT_CONTENTS)
def test_working_shapes_fit_each_other(name):
    """Inputs and every contender at the 7b system's shapes, on tensors that take no memory."""
    for case in chosen([name])[name].cases("meta", "working"):
        inputs = case.make_inputs()
        shapes = [
            [tensor.shape for tensor in _tensors(call(*inputs))] for call in case.without_compiled().contenders.values()
        ]
        assert all(found == shapes[0] for found in shapes), case.label


def test_families():
    families = {module.FAMILY for module in chosen([]).values()}
    assert families == {"language", "attention", "conditioning", "unet", "models"}
    assert list(chosen(["operators"])) == OPERATORS
    assert set(chosen(["models"])) == {"dreamllm", "inference", "llama_training_step", "diffusion_unet", "sampling"}
    assert set(chosen(["language", "geglu"])) > {"rms_norm", "swiglu", "geglu"}
    assert set(chosen(["attention"])) == {"attention", "decode_attention"}
    assert set(chosen(["attention"], exactly=True)) == {"attention"}
    with pytest.raises(ValueError, match=r"'poetry' has no benchmark \(families: attention"):
        chosen(["poetry"])


def test_a_benchmark_without_its_library_is_a_row(tmp_path, monkeypatch):
    """On a bare machine, say without diffusers, the others run."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "benchmarks.ops.bench_guided_step", raising=False)
    modules = chosen(["guided_step", "rms_norm"])
    assert modules["rms_norm"].FAMILY == "language"
    code, record = recorded(tmp_path, monkeypatch, {"guided_step": modules["guided_step"]})
    assert code == 0
    assert "diffusers" in record["not_here"]["guided_step"]


def options(**changes):
    values = {"names": [], "device": "cpu", "size": None, "caches": "warm", "seconds": 0.01, "rounds": 5}
    values |= {"threads": torch.get_num_threads(), "compile": True, "record": None, "only": None, "exactly": False}
    return argparse.Namespace(**{**values, **changes})


def case(operator, ours=lambda x: x * 2, **more):
    def make():
        return [torch.ones(100)]

    return Case(operator, "[100]", make, {"ours": ours, "eager": lambda x: x + x}, 800, 100, 0.0, **more)


def module(cases):
    return SimpleNamespace(cases=cases, boundary=lambda device: {})


def raising(x):
    raise RuntimeError("no memory\nmore")


def broken_cases(device, size):
    yield case("first")
    raise ValueError("bad shape")


def elsewhere(device, size):
    raise NotHereError("needs a larger machine")


def recorded(tmp_path, monkeypatch, modules, **changes):
    monkeypatch.setattr(running, "chosen", lambda names, exactly: modules)
    monkeypatch.setattr("benchmarks.timing.matmul_gflops", lambda device: {})
    code = run(options(record=str(tmp_path / "r"), **changes))
    return code, json.loads((tmp_path / "r.json").read_text())


def test_what_is_wrong_or_fails_stops_nothing_and_is_recorded(tmp_path, monkeypatch, capsys):
    modules = {
        "wrong": module(lambda device, size: [case("wrong", ours=lambda x: x * 3)]),
        "fails": module(lambda device, size: [case("fails", ours=raising)]),
        "half": module(broken_cases),
        "elsewhere": module(elsewhere),
        "right": module(lambda device, size: [case("right")]),
    }
    code, record = recorded(tmp_path, monkeypatch, modules)
    assert code == 1
    assert [found["operator"] for found in record["cases"]] == ["first", "right"]
    assert record["not_here"] == {"elsewhere": "needs a larger machine"}
    errors = record["errors"]
    assert set(errors) == {"wrong [100]", "fails [100]", "half: its cases"}
    assert "ours and eager differ by 5.00e-01" in errors["wrong [100]"]
    assert errors["fails [100]"] == "RuntimeError: no memory"
    out = capsys.readouterr().out
    assert "WRONG  wrong [100]" in out
    assert "elsewhere: not run: needs a larger machine" in out


def test_a_benchmark_that_cannot_run_here_is_no_failure(tmp_path, monkeypatch):
    code, record = recorded(tmp_path, monkeypatch, {"e": module(elsewhere), "r": module(lambda d, s: [case("r")])})
    assert code == 0
    assert record["errors"] == {}


def test_only_some_cases(tmp_path, monkeypatch):
    modules = {"x": module(lambda device, size: [case("mini stage2"), case("mini stage3")])}
    code, record = recorded(tmp_path, monkeypatch, modules, only="stage3")
    assert code == 0
    assert [found["operator"] for found in record["cases"]] == ["mini stage3"]
    assert running.run(options(only="stage9")) == 2


@pytest.mark.parametrize(("device", "wanted", "size"), [("cpu", None, "small"), ("cpu", "working", "working")])
def test_size_reaches_the_benchmark_and_the_record(device, wanted, size, tmp_path, monkeypatch):
    seen = []

    def cases(device, size):
        seen.append((device, size))
        return [case("x")]

    _, record = recorded(tmp_path, monkeypatch, {"x": module(cases)}, size=wanted)
    assert seen == [(device, size)]
    assert record["size"] == size
    assert running.default_size("cuda") == "working"


def test_a_missing_peer_is_a_row(tmp_path, monkeypatch, capsys):
    peers = {"absent": "not installed", "odd": lambda x: x * 5, "failing": raising, "good": lambda x: x * 2}
    code, record = recorded(tmp_path, monkeypatch, {"x": module(lambda device, size: [case("x", peers=peers)])})
    assert code == 0
    (found,) = record["cases"]
    assert list(found["contenders"]) == ["ours", "eager", "good"]
    assert found["failures"]["absent"] == "not installed"
    assert found["failures"]["failing"] == "RuntimeError: no memory"
    assert found["failures"]["odd"].startswith("its result differs by")
    assert "absent: not installed (1 case)" in capsys.readouterr().out


def test_a_peer_may_overwrite_its_inputs(tmp_path, monkeypatch):
    """When checked it gets copies: the contenders' inputs stay, gradients are asked of leaves of its own."""
    seen = []

    def overwriting(x):
        seen.append(x.requires_grad)
        y = x * 2
        x.detach().zero_()
        return y

    def make():
        return [torch.ones(10, requires_grad=True)]

    peers = {"a": overwriting, "b": overwriting}
    one = Case("x", "[10]", make, {"ours": lambda x: x * 2}, 80, 10, 0.0, peers=peers)
    code, record = recorded(tmp_path, monkeypatch, {"x": module(lambda device, size: [one])})
    assert code == 0
    assert list(record["cases"][0]["contenders"]) == ["ours", "a", "b"]
    assert all(seen)


def test_without_a_gpu_cuda_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(options(device="cuda")) == 2
    assert "torch sees no NVIDIA GPU here" in capsys.readouterr().err


class FakeRuns:
    """Stands in for the commands that `bench` starts."""

    def __init__(self, monkeypatch, codes):
        self.commands, self.codes = [], codes
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, command, cwd, check):
        words = command[3:]
        self.commands.append(words)
        code = self.codes.get(words[1] if words[0] == "run" else words[0], 0)
        if words[0] == "run" and code != 9:  # 9: it wrote nothing
            from pathlib import Path

            Path(f"{words[words.index('--record') + 1]}.json").write_text("{}")
        return SimpleNamespace(returncode=code)


def bench(monkeypatch, out, codes):
    runs = FakeRuns(monkeypatch, codes)
    monkeypatch.setattr("sys.argv", ["benchmarks", "bench", "--out", str(out)])
    return main(), runs.commands


def test_bench_runs_operators_and_workloads_and_reports_them(tmp_path, monkeypatch, capsys):
    code, commands = bench(monkeypatch, tmp_path, {})
    assert code == 0
    assert [words[:2] for words in commands[:2]] == [["run", "operators"], ["run", "dreamllm"]]
    assert all(words[words.index("--size") + 1] == "small" for words in commands[:2])
    assert commands[2][:3] == ["report", str(tmp_path / "operators.json"), str(tmp_path / "models.json")]
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"The page: {tmp_path / 'report.html'}")


@pytest.mark.parametrize("codes", [{"operators": 1}, {"dreamllm": 1}, {"report": 2}, {"operators": 9, "dreamllm": 9}])
def test_bench_fails_where_a_part_does(codes, tmp_path, monkeypatch, capsys):
    (tmp_path / "operators.json").write_text("{}")  # of an earlier run
    code, commands = bench(monkeypatch, tmp_path, codes)
    assert code == 1
    assert "FAILED" in capsys.readouterr().err
    assert any(words[0] == "report" for words in commands) == (9 not in codes.values())
