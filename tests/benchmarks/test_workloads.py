"""Every workload is like for like before it is timed, and the harness reports what failed."""

import math

import pytest
import torch

from benchmarks.harness import Case, check_contenders, measure
from benchmarks.models.inference import inference_workloads
from benchmarks.models.workloads import COMPILED, KEEPING, OURS, PATTERN, workloads

WORKLOADS = workloads("tiny", compiled=False)
INFERENCE = inference_workloads("tiny", steps=4)


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
