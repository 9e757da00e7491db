"""The calls that tuning times, run by the interpreter: every one looks up the entry that it is there to measure."""

import math

import pytest

from dreamkernels.devices import load_device, loader, tuned
from dreamkernels.tuning import WORKLOADS, tune
from dreamkernels.tuning.workloads import SMALL, buckets_of

SHIPPED = load_device("sm_80").launch


@pytest.mark.parametrize("kernel", WORKLOADS)
def test_every_workload_uses_its_entry(kernel, monkeypatch):
    for entry, bucket in zip(SHIPPED[kernel], buckets_of(SHIPPED[kernel]), strict=True):
        used = []

        def recording(architecture, model, name, shipped, used=used):
            used.append((name, tuned.bucket_of(shipped)))
            return shipped

        monkeypatch.setattr(loader.tuned, "standing_in", recording)
        for call in WORKLOADS[kernel].calls(bucket, "cpu", SMALL):
            loader.launch_parameters.cache_clear()
            used.clear()
            call()
            assert (kernel, tuned.bucket_of(entry)) in used, f"{bucket}: {used}"


def test_tunes_a_kernel_that_runs(tmp_path):
    """Candidates really run, are compared with the shipped result, and the cheapest by the given clock is stored."""

    def clock(call):
        call()
        chosen = loader.launch_parameters("sm_80", "softmax_groups", 16)
        return 100.0 + 20 * abs(math.log2(chosen["groups_per_program"] / 32))

    path = tmp_path / "sm_80.json"
    names = ["softmax_groups"]
    outcomes = list(tune(WORKLOADS, "sm_80", "a GPU", path, clock, {"gpu": "a GPU"}, "cpu", kernels=names, size=SMALL))
    assert [outcome.reason for outcome in outcomes] == ["", "", ""]
    first, *others = tuned.parse(path, "sm_80")["a GPU"]["launch"]["softmax_groups"]
    assert tuned.parameters_of(first) == {"groups_per_program": 32, "num_warps": 4}
    assert [tuned.parameters_of(e) for e in others] == [tuned.parameters_of(e) for e in SHIPPED["softmax_groups"][1:]]
