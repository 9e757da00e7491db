"""Every workload is like for like before it is timed, and the harness reports what failed."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.extrapolation import extrapolations
from benchmarks.harness import (
    Case,
    Deferred,
    NotHereError,
    Part,
    Result,
    Timing,
    _tensors,
    check_contenders,
    measure,
)
from benchmarks.models import bench_dreamllm, bench_inference
from benchmarks.models.inference import inference_workloads
from benchmarks.models.setting import LARGE, Setting, in_float32
from benchmarks.models.workloads import COMPILED, KEEPING, OURS, PATTERN, workloads
from benchmarks.timing import Times

WORKLOADS = workloads(Setting("tiny"), compiled=False)
INFERENCE = inference_workloads(Setting("tiny"), steps=4)


@pytest.mark.parametrize("name", WORKLOADS)
def test_contenders_agree(name):
    case = WORKLOADS[name]()
    assert list(case.contenders) == ([OURS, KEEPING, PATTERN] if name in ("stage2", "stage3") else [OURS, PATTERN])
    assert check_contenders(case) == {}


@pytest.mark.parametrize("name", INFERENCE)
def test_cases_of_the_engine_agree(name):
    case = INFERENCE[name]()
    assert next(iter(case.contenders)) == OURS
    assert check_contenders(case) == {}


def test_a_step_repeats_its_draws():
    """Rounds of one contender differ only by what the optimiser changed."""
    step = WORKLOADS["creation_cached"]().contenders[OURS]
    first, second = step(), step()
    assert first[1] != second[1]
    assert math.isclose(first[1], second[1], rel_tol=0.2)


def test_stage2_reports_memory_and_time_per_sample():
    result = measure(WORKLOADS["stage2"](), rounds=1)
    record = result.record()["contenders"]
    assert set(record) == {OURS, KEEPING, PATTERN}
    for values in record.values():
        assert values["peak_extra_bytes"] > 0
        assert values["samples_per_second"] == pytest.approx(1 / values["seconds_per_sample"], rel=0.01)
        assert values["seconds_per_sample"] == pytest.approx(values["median_us"] / 8e6, rel=0.01)


def test_memory_kept_between_calls_counts():
    def call():
        return torch.zeros(8)

    case = Case("x", "", list, {"a": call, "b": call}, 1, 0, 0.0, memory=True, held_bytes={"a": 1000})
    peaks = measure(case, rounds=1).peak_extra_bytes
    assert peaks["a"] == peaks["b"] + 1000


def failing():
    raise RuntimeError("no compiler\nsecond line")


def test_a_fallible_contender_that_fails_is_a_row():
    case = Case("x", "", list, {"a": lambda: torch.zeros(1), COMPILED: failing}, 1, 0, 0.0, fallible=(COMPILED,))
    result = measure(case, rounds=1)
    assert [timing.contender for timing in result.timings] == ["a"]
    assert result.failures == {COMPILED: "RuntimeError: no compiler"}
    assert result.record()["failures"] == result.failures


def test_another_failure_and_a_wrong_result_are_errors():
    ours = {"a": lambda: torch.zeros(1)}
    with pytest.raises(RuntimeError, match="no compiler"):
        check_contenders(Case("x", "", list, {**ours, "b": failing}, 1, 0, 0.0))
    wrong = {**ours, "b": lambda: torch.ones(1)}
    with pytest.raises(AssertionError, match="a and b differ"):
        check_contenders(Case("x", "", list, wrong, 1, 0, 0.0, fallible=("b",)))


# -- in bfloat16, in parts, on a GPU -----------------------------------------------------------------------------------

LOW = Setting("tiny", dtype=torch.bfloat16)
LOW_WORKLOADS = workloads(LOW, compiled=False, layer_counts=(1, 2), steps=4) | inference_workloads(LOW, steps=2)


@pytest.mark.parametrize("name", LOW_WORKLOADS)
def test_contenders_agree_as_far_as_bfloat16_rounds(name):
    case = LOW_WORKLOADS[name]()
    assert check_contenders(case) == {}
    assert "bfloat16" in case.label
    held = int(name.split("_")[1]) if name.endswith("_layers") else None
    assert (None if case.part is None else (case.part.held, case.part.whole)) == (held and (held, 2))
    assert (f"{held} of 2 layers" in case.label) == (held is not None)


@pytest.mark.parametrize("result", [0, 1, 3])
def test_what_rounding_does_not_explain_is_found_in_bfloat16(result):
    """Losses that are off by 2%, a gradient norm that is off by 15%."""
    case = LOW_WORKLOADS["stage2_2_layers"]()
    ours = case.contenders[OURS]

    def off():
        values = list(ours())
        values[result] = values[result] * (1.15 if result == 3 else 1.02)
        return values

    case.contenders[OURS] = off
    with pytest.raises(AssertionError, match=f"{OURS} and .* differ by .* is allowed"):
        check_contenders(case)


def test_a_token_that_rounding_does_not_explain_is_found():
    case = LOW_WORKLOADS["captioning_greedy"]()
    tokens = case.contenders[OURS]()
    assert case.wrong([tokens]) == ""
    for position in (0, 15, 31):
        other = tokens.clone()
        other[position] = 40 if tokens[position] != 40 else 41
        assert "below the likeliest one, but rounding explains" in case.wrong([other])
    assert "are not 32 tokens" in case.wrong([tokens[:5]])
    case.contenders[PATTERN] = lambda: tokens.roll(1)
    with pytest.raises(AssertionError, match="original pattern: a chosen token"):
        check_contenders(case)


def test_weights_come_back_from_float32_as_they_were():
    model = LOW.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = list(map(id, model.parameters()))
    with in_float32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert list(map(id, model.parameters())) == objects
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_setting_makes_what_it_says():
    model = LOW.with_layers(1).model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(model.decoder.layers) == 1
    assert model.decoder.rotary_emb.inv_freq.dtype == torch.float32
    again = LOW.with_layers(1).model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert Setting.usual("7b", "cuda") == Setting("7b", "cuda", torch.bfloat16)
    assert Setting.usual("mini").dtype == torch.float32
    with pytest.raises(ValueError, match="at least 1 layer, not 0"):
        LOW.with_layers(0).model()


def test_the_7b_runs_on_a_gpu_only_and_case_by_case():
    with pytest.raises(NotHereError, match="needs a GPU"):
        next(bench_dreamllm.cases("cpu", "working"))
    found = list(bench_dreamllm.cases("cuda", "working"))
    assert all(isinstance(case, Deferred) for case in found)
    names = [case.name for case in found]
    assert {f"{LARGE} {kind}_{layers}_layers" for kind in ("stage2", "stage3") for layers in (2, 6)} <= set(names)
    small = [case.name for case in bench_dreamllm.cases("cuda", "small")]
    assert len(names) == len(small) + 2
    assert "mini stage2" in small


def test_the_engine_has_benchmarks_of_its_own():
    """As `python -m benchmarks run inference` runs them."""
    with pytest.raises(NotHereError, match="needs a GPU"):
        next(bench_inference.cases("cpu", "working"))
    cases = list(bench_inference.cases("cpu", "small"))
    assert [case.name for case in cases] == [f"mini {name}" for name in INFERENCE]


def of_layers(held, whole=10, **medians):
    label, part = f"{held} of {whole} layers, 8 documents", Part("layers", held, whole)
    case = Case("7b stage2", label, list, dict.fromkeys(medians, list), 0, 0, 0.0, samples=8, part=part)
    times = {name: Times(median - 2, median, median - 1, median + 2, 5) for name, median in medians.items()}
    return Result(case, timings=[Timing(name, found) for name, found in times.items()])


def test_two_counts_of_layers_become_an_extrapolation():
    """In which every layer costs 3 us of ours and 5 us of the pattern; the middle one of three counts is not needed."""
    results = [of_layers(n, ours=7.0 + 3 * n, theirs=9.0 + 5 * n, noise=50.0 - n) for n in (2, 3, 6)]
    (found,) = extrapolations(results)
    assert (found.operator, found.label) == ("7b stage2", "8 documents")
    assert found.how == "extrapolated, not measured: to 10 layers on the straight line through 2 and 6"
    assert list(found.lines) == ["ours", "theirs"]  # the third became faster with more layers
    assert (found.lines["ours"].median_us, found.lines["ours"].each_us) == (37.0, 3.0)
    assert found.times_as_fast_as("theirs") == pytest.approx(59 / 37)
    assert found.record()["contenders"]["theirs"]["seconds_per_sample"] == pytest.approx(59e-6 / 8, abs=1e-6)
    assert results[0].record()["part"] == {"unit": "layers", "held": 2, "whole": 10}
    assert extrapolations(results[:1]) == []


def test_the_spread_of_an_extrapolation_is_that_of_its_ends():
    """From 15, a high 13, to 24, a low 25: 33 at ten layers. From 12 to 27: 42."""
    (found,) = extrapolations([of_layers(2, ours=13.0), of_layers(6, ours=25.0)])
    line = found.lines["ours"]
    assert (line.least_us, line.median_us, line.most_us) == (33.0, 37.0, 42.0)


def test_the_command_measures_two_counts_of_layers_and_records_what_follows(tmp_path, monkeypatch, capsys):
    """The way of the 7b on a GPU, at tiny: bfloat16, two counts, an extrapolation, one record."""
    monkeypatch.setattr(bench_dreamllm, "SHAPES", {"small": "tiny"})
    monkeypatch.setattr(bench_dreamllm, "LAYERS", {"small": (1, 2)})
    monkeypatch.setattr(Setting, "usual", lambda size, device: dataclasses.replace(LOW, size=size, device=device))
    monkeypatch.setattr("benchmarks.timing.matmul_gflops", lambda device: {})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "dreamllm", "--exactly", "--only", "tiny stage2"])
    sys.argv += [
        "--no-compile",
        "--rounds",
        "1",
        "--threads",
        str(torch.get_num_threads()),
        "--record",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr("benchmarks.running.restart_with_settings", lambda arguments: None)
    assert main() == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert [case["part"]["held"] for case in record["cases"]] == [1, 2]
    assert all(
        case["case"].startswith(f"{n} of 2 layers, bfloat16, 8 doc") for n, case in enumerate(record["cases"], 1)
    )
    said = capsys.readouterr().out
    for found in record["extrapolations"]:  # none where time happened not to grow with the layers
        assert found["whole"] == 2
        assert found["how"].startswith("extrapolated, not measured")
        assert found["how"] in said


@pytest.fixture
def elsewhere():
    """Tensors made without a device hold no values, so what needs them fails as it would beside a model on a GPU."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


MADE = {name: WORKLOADS[name] for name in ("comprehension", "creation_online", "stage2", "stage3", "captioning_greedy")}


@pytest.mark.parametrize("name", MADE)
def test_the_pattern_makes_its_tensors_where_its_model_is(name, request):
    """Drawing is left out: diffusers' scheduler makes small tensors on the host, as in its pipelines."""
    case = MADE[name]()
    request.getfixturevalue("elsewhere")
    for tensor in _tensors(case.contenders[PATTERN]()):
        assert tensor.device.type == "meta" or tensor.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WORKLOADS | INFERENCE)
def test_contenders_agree_on_a_gpu(name, dtype):
    setting = Setting("mini", "cuda", dtype)
    case = (workloads(setting, compiled=False, steps=8) | inference_workloads(setting, steps=4))[name]()
    result = measure(case, rounds=1, seconds=0.1)
    assert result.failures == {}
    assert all(peak > 0 for peak in result.peak_extra_bytes.values())
