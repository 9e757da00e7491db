"""Tuned launch parameters: how they are searched, stored and looked up. The clock is given; no GPU is needed."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dreamkernels import devices
from dreamkernels.devices import ARCHITECTURES, TunedParametersWarning, load_device, loader, tuned, use_tuned
from dreamkernels.tuning import WORKLOADS, RejectedError, Workload, neighbours, operators, search, tune
from dreamkernels.tuning.tune import NO_TIME
from dreamkernels.tuning.workloads import Bucket, buckets_of

ROOT = Path(__file__).parent.parent
GPU = "a GPU of these tests"
KERNEL = "swiglu_backward"
WIDE = {"rows_per_program": 1, "block_columns": 512, "num_warps": 8}


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    """A machine with one GPU model and an empty cache folder."""
    monkeypatch.setenv("DREAMKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "model_served_by", lambda architecture: GPU)
    use_tuned(True)
    yield
    use_tuned(True)


def table(architecture: str = "sm_90") -> Path:
    return devices.cache_folder() / f"{architecture}.json"


def store(parameters, bucket=(1048576, None), model=GPU, kernel=KERNEL):
    limits = {name: value for name, value in zip(tuned.LIMITS_OF_BUCKET, bucket, strict=True) if value is not None}
    tuned.store(table(), "sm_90", model, {"gpu": model}, kernel, {**limits, **parameters, "measured": {"share": 0.5}})


def wide():
    return devices.launch_parameters("sm_90", KERNEL, 4096)


# Search


def bowl(**wanted):
    """Cheapest at the wanted parameters, in steps of halving and doubling."""
    return lambda p: 1.0 + sum(abs(math.log2(p[name] / value)) for name, value in wanted.items())


def test_walks_to_the_cheapest():
    found = search({"num_warps": 4, "block_columns": 1024}, bowl(num_warps=8, block_columns=256))
    assert found.parameters == {"num_warps": 8, "block_columns": 256}
    assert found.cost == pytest.approx(1 / 4)
    assert found.rejected == 0


def test_stops_after_its_rounds():
    assert search({"block_columns": 1024}, bowl(block_columns=16), rounds=2).parameters == {"block_columns": 256}


def test_never_leaves_what_kernels_allow():
    tried = []

    def cost(parameters):
        tried.append(parameters)
        return 1 / (parameters["num_warps"] * parameters["num_stages"])

    found = search({"num_warps": 8, "num_stages": 4, "split_heads": 1}, cost)
    assert found.parameters == {"num_warps": 16, "num_stages": 5, "split_heads": 1}
    assert max(p["num_warps"] for p in tried) == 16
    assert max(p["num_stages"] for p in tried) == 5


def test_candidates_that_cannot_be_used_are_passed_over():
    def cost(parameters):
        if parameters["num_warps"] > 4:
            raise RejectedError("out of registers")
        return bowl(num_warps=16, block_columns=512)(parameters)

    found = search({"num_warps": 4, "block_columns": 1024}, cost)
    assert found.parameters == {"num_warps": 4, "block_columns": 512}
    assert found.rejected >= 1


def test_shipped_parameters_that_fail_are_an_error():
    def cost(parameters):
        raise RejectedError("no such kernel")

    with pytest.raises(RejectedError, match="no such kernel"):
        search({"num_warps": 4}, cost)


def test_noise_is_no_gain():
    assert search({"num_warps": 4}, lambda p: 1.0 if p["num_warps"] == 4 else 0.98).parameters == {"num_warps": 4}


def test_a_lucky_measurement_is_measured_again():
    times = {}

    def cost(parameters):
        warps = parameters["num_warps"]
        times[warps] = times.get(warps, 0) + 1
        return 0.5 if warps == 8 and times[warps] == 1 else 1.0

    assert search({"num_warps": 4}, cost).parameters == {"num_warps": 4}
    assert times[8] == 2


def test_unknown_parameters_are_named():
    with pytest.raises(ValueError, match="'block_moons' has no range"):
        list(neighbours({"block_moons": 4}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_shipped_entry_can_be_tuned(architecture):
    """And every kernel of the launch tables has calls to time (which the interpreter's tests run)."""
    launch = load_device(architecture).launch
    assert set(WORKLOADS) == set(launch)
    for kernel, entries in launch.items():
        for entry in entries:
            found = list(neighbours(tuned.parameters_of(entry)))
            assert found, kernel
            assert all(candidate.keys() == tuned.parameters_of(entry).keys() for candidate in found)


def test_operators_lead_to_all_kernels():
    assert sorted(kernel for kernels in operators().values() for kernel in kernels) == sorted(WORKLOADS)


def test_buckets_begin_where_the_one_before_ends():
    entries = [{"max_width": 64, "max_length": 512}, {"max_width": 64}, {"max_width": 128}]
    assert buckets_of(entries) == [Bucket(0, 64, 0, 512), Bucket(0, 64, 512, None), Bucket(64, 128, 0, None)]


# Look-up


def test_without_a_file_the_shipped_table_serves_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wide() == {"rows_per_program": 1, "block_columns": 1024, "num_warps": 4}


def test_tuned_entries_come_before_shipped_ones_by_bucket():
    narrow = devices.launch_parameters("sm_90", KERNEL, 256)
    store(WIDE)
    assert wide() == WIDE
    assert devices.launch_parameters("sm_90", KERNEL, 256) == narrow
    assert devices.launch_parameters("sm_80", KERNEL, 4096)["block_columns"] == 1024
    assert load_device("sm_90").launch[KERNEL][-1]["block_columns"] == 1024  # reports see what ships


def test_lengths_are_buckets_of_their_own():
    shipped = devices.launch_parameters("sm_90", "attention_forward_full", 64, 4096)
    short = {"split_heads": 1, "block_q": 32, "block_k": 32, "num_warps": 2, "num_stages": 2}
    store(short, (64, 512), kernel="attention_forward_full")
    assert devices.launch_parameters("sm_90", "attention_forward_full", 64, 512) == short
    assert devices.launch_parameters("sm_90", "attention_forward_full", 64, 4096) == shipped


def test_another_gpus_entries_are_not_used():
    store(WIDE, model="another GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wide()["block_columns"] == 1024


def test_entries_of_another_release_are_not_used():
    """Whose shipped table has other parameters, or no such bucket."""
    store({**WIDE, "cluster": 2})
    store(WIDE, bucket=(777, None))
    assert wide()["block_columns"] == 1024


def test_a_later_entry_replaces_that_of_its_bucket_alone():
    store({"rows_per_program": 2, "block_columns": 256, "num_warps": 4}, bucket=(256, None))
    store({**WIDE, "num_warps": 2})
    store(WIDE)
    store(WIDE, model="another GPU")
    content = json.loads(table().read_text())
    assert [entry["max_width"] for entry in content["devices"][GPU]["launch"][KERNEL]] == [256, 1048576]
    assert wide() == WIDE
    assert set(content["devices"]) == {GPU, "another GPU"}
    assert list(table().parent.iterdir()) == [table()]


def test_use_tuned_turns_it_off_and_names_a_folder(tmp_path):
    store(WIDE)
    use_tuned(False)
    assert wide()["block_columns"] == 1024
    use_tuned(tmp_path / "elsewhere")
    assert wide()["block_columns"] == 1024
    use_tuned(tmp_path / "devices")
    assert wide() == WIDE


def test_the_cache_folder(monkeypatch, tmp_path):
    assert devices.cache_folder() == tmp_path / "devices"
    monkeypatch.delenv("DREAMKERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert devices.cache_folder() == tmp_path / "xdg" / "dreamkernels" / "devices"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert devices.cache_folder() == tmp_path / "home" / ".cache" / "dreamkernels" / "devices"


def entry_with(value):
    launch = {KERNEL: [{"max_width": 1048576, **WIDE, "num_warps": value}]}
    return json.dumps({"format": tuned.FORMAT, "architecture": "sm_90", "devices": {GPU: {"launch": launch}}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ half a file", "cannot be read"),
        ("[]", "is no file of tuned launch parameters"),
        ('{"format": "of somebody else"}', "is no file of tuned launch parameters"),
        (json.dumps({"format": tuned.FORMAT, "architecture": "sm_80", "devices": {}}), "was tuned for sm_80"),
        (json.dumps({"format": tuned.FORMAT, "architecture": "sm_90"}), "damaged"),
        (json.dumps({"format": tuned.FORMAT, "architecture": "sm_90", "devices": {GPU: 3}}), "damaged"),
        (entry_with("eight"), "num_warps is 'eight'"),
        (entry_with(-8), "num_warps is -8"),
        (entry_with(True), "num_warps is True"),
    ],
)
def test_a_file_that_is_not_ours_warns_once_and_the_shipped_table_serves(text, reason):
    table().parent.mkdir(parents=True)
    table().write_text(text)
    with pytest.warns(TunedParametersWarning, match=reason) as found:
        served = [wide(), devices.launch_parameters("sm_90", "rotary", 64)]
    assert served[0]["block_columns"] == 1024
    assert len(found) == 1
    assert str(table()) in str(found[0].message)
    assert "python -m dreamkernels tune" in str(found[0].message)
    with pytest.raises(ValueError, match=reason):
        store(WIDE)
    assert table().read_text() == text  # a file of somebody else is not overwritten


# Tuning


def fake(device_calls, result=None):
    """A workload whose calls compute the same whatever the parameters, unless a result is given for them."""

    def make(bucket, dtype, device, size):
        def call():
            device_calls.append(wide())
            return torch.ones(3, dtype=dtype) if result is None else result(wide(), dtype)

        return call

    return {KERNEL: Workload("swiglu", make)}


def clock(call):
    call()
    return 100 * bowl(num_warps=8, block_columns=512)(wide())


def outcomes_of(workloads, timer=clock, **options):
    return list(tune(workloads, "sm_90", GPU, table(), timer, {"gpu": GPU, "driver": "1"}, "cpu", **options))


def test_the_cheapest_is_stored_with_provenance_and_used():
    calls = []
    narrow, wide_one = outcomes_of(fake(calls))
    assert wide_one.found.parameters == WIDE
    assert wide_one.found.cost == pytest.approx(1 / 3)
    assert narrow.found.cost == 1.0  # its own parameters change nothing that this clock reads
    assert wide() == WIDE
    content = json.loads(table().read_text())["devices"][GPU]
    assert content["measured"] == {"gpu": GPU, "driver": "1"}
    entry = content["launch"][KERNEL][-1]
    assert entry["measured"]["share"] == pytest.approx(1 / 3, abs=1e-4)
    assert entry["measured"]["shipped_us"] == [300.0, 300.0]  # bfloat16 and float32
    assert WIDE in calls


def test_a_candidate_with_another_result_is_rejected():
    def result(parameters, dtype):
        return torch.full((3,), 2.0 if parameters["num_warps"] == 8 else 1.0, dtype=dtype)

    outcome = outcomes_of(fake([], result))[-1]
    assert outcome.found.parameters == {"rows_per_program": 1, "block_columns": 512, "num_warps": 4}
    assert outcome.found.rejected >= 1


def test_a_candidate_with_nan_is_rejected():
    def result(parameters, dtype):
        return torch.full((3,), math.nan if parameters["block_columns"] == 512 else 1.0, dtype=dtype)

    assert outcomes_of(fake([], result))[-1].found.parameters["block_columns"] == 1024


def test_a_failure_is_reported_and_the_next_entry_tuned():
    def make(bucket, dtype, device, size):
        if bucket.max_width == 256:
            raise RuntimeError("out of memory")
        return lambda: torch.ones(1)

    failed, tuned_one = outcomes_of({KERNEL: Workload("swiglu", make)})
    assert failed.found is None
    assert failed.reason == "failed: out of memory"
    assert tuned_one.found.parameters == WIDE


def test_a_second_run_goes_on_where_the_first_ended():
    assert [outcome.reason for outcome in outcomes_of(fake([]), minutes=-1)] == [NO_TIME, NO_TIME]
    assert not table().exists()
    store({**WIDE, "num_warps": 2})
    first, second = outcomes_of(fake([]))
    assert (first.reason, second.reason) == ("", "tuned before")
    assert wide()["num_warps"] == 2
    assert [outcome.reason for outcome in outcomes_of(fake([]), again=True)] == ["", ""]
    assert wide()["num_warps"] == 8


def test_candidates_are_compared_with_shipped_ones_not_with_tuned_ones():
    store({**WIDE, "block_columns": 2048})
    calls = []
    outcomes_of(fake(calls), again=True)
    first = next(call for call in calls if call["rows_per_program"] == 1 and call["block_columns"] != 2048)
    assert first == {"rows_per_program": 1, "block_columns": 1024, "num_warps": 4}


def test_nothing_stays_behind_after_tuning():
    outcomes_of(fake([]))
    assert not loader._trials


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "tuning measures on an NVIDIA GPU, and device 'cuda' is not here"),
        (["--device", "cpu"], "device 'cpu' is not one"),
        (["painting"], "painting cannot be tuned; operators: rms_norm"),
    ],
)
def test_the_command_says_what_is_missing(arguments, said):
    command = [sys.executable, "-m", "dreamkernels", "tune", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.gpu
def test_tunes_one_operator_on_this_gpu(monkeypatch, tmp_path):
    out = tmp_path / "tuned.json"
    command = [sys.executable, "-m", "dreamkernels", "tune", "softmax_groups_", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    architecture = devices.architecture_of(torch.device("cuda"))
    entries = tuned.parse(out, architecture)[torch.cuda.get_device_name()]["launch"]["softmax_groups"]
    assert len(entries) == len(load_device(architecture).launch["softmax_groups"])
