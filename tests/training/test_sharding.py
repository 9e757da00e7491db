"""One, two and four processes train the same model, however it is sharded; when one of them fails, all end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dreamllm.monitoring import read_samples
from dreamllm.training import RunSettings, load_stored_batch
from dreamllm.training.distributed import Processes
from dreamllm.training.sharding import make_mesh
from tests.training import shared_runs
from tests.training.ranks import run_in, start
from tests.training.runs import metrics, weights

REPOSITORY = Path(__file__).parents[2]

TOLERANCE = 1e-5
"""Relative, of losses and gradient norms: sums over lanes and shards are taken in other orders, in float32."""


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory) -> Path:
    """The folder of the run of one process that nothing was sharded in."""
    out = tmp_path_factory.mktemp("alone") / "out"
    shared_runs.train(root, out, {})
    return out


def assert_same_curve(out: Path, reference: Path) -> None:
    """The same documents in every step, losses within `TOLERANCE`, and final weights as near as their updates."""
    found, expected = metrics(out), metrics(reference)
    assert len(found) == len(expected) == 3 * shared_runs.STEPS
    for line, other in zip(found, expected, strict=True):
        measured = ("loss", "lm_loss", "vm_loss", "grad_norm")
        counted = {key: value for key, value in line.items() if key not in measured}
        assert counted == {key: value for key, value in other.items() if key not in measured}
        for key in measured:
            assert line[key] == (other[key] and pytest.approx(other[key], rel=TOLERANCE)), (line["step"], key)
    for folder in ("one/model", "two/model", "model"):
        ours, theirs = weights(out / folder), weights(reference / folder)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {"sharding": "full"}),
        (2, {"sharding": "none"}),
        (4, {"sharding": "hybrid", "shard_size": 2, "recompute_layers": "full"}),
        (2, {"sharding": "full", "shard_frozen_above_mib": 0}),
        pytest.param(1, {"sharding": "full"}, marks=pytest.mark.slow),
        pytest.param(1, {"sharding": "grad_op"}, marks=pytest.mark.slow),
        pytest.param(2, {"sharding": "grad_op"}, marks=pytest.mark.slow),
        pytest.param(2, {"sharding": "hybrid", "shard_size": 1, "workers": 1}, marks=pytest.mark.slow),
        pytest.param(2, {"sharding": "full", "reduce_each_lane": True}, marks=pytest.mark.slow),
        pytest.param(2, {"sharding": "full", "save_in_background": False}, marks=pytest.mark.slow),
        pytest.param(2, {"sharding": "full", "fused_operators": False}, marks=pytest.mark.slow),
        pytest.param(1, {"sharding": "full", "shard_frozen_above_mib": 0}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"sharding": "hybrid", "shard_size": 2, "shard_frozen_above_mib": 0, "recompute_layers": "selective"},
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {"sharding": "none"}, marks=pytest.mark.slow),
        pytest.param(4, {"sharding": "full"}, marks=pytest.mark.slow),
        pytest.param(4, {"sharding": "grad_op", "reduce_each_lane": True}, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_processes_and_the_sharding_do_not_change_the_curves(root, alone, tmp_path, world, settings):
    ended = run_in(world, shared_runs.train, root, tmp_path / "out", settings, logs=tmp_path / "logs")
    assert_same_curve(tmp_path / "out", alone)
    assert "the model is in" in ended[0].text
    assert [end.text for end in ended[1:]] == [""] * (world - 1)


def test_packs_of_a_number_of_tokens_are_the_same_in_all_processes(root, tmp_path):
    shared_runs.train(root, tmp_path / "alone", {}, tokens=300)
    run_in(2, shared_runs.train, root, tmp_path / "out", {"sharding": "full"}, 300, logs=tmp_path / "logs")
    assert_same_curve(tmp_path / "out", tmp_path / "alone")


def test_samples_of_a_sharded_model_are_those_of_a_whole_one_and_change_nothing(root, alone, tmp_path):
    shared_runs.watched(root, tmp_path / "whole", {})
    settings = {"sharding": "full", "shard_frozen_above_mib": 0}
    run_in(2, shared_runs.watched, root, tmp_path / "out", settings, logs=tmp_path / "logs")
    assert_same_curve(tmp_path / "out", alone)
    found, expected = read_samples(tmp_path / "out"), read_samples(tmp_path / "whole")
    assert len(found) == len(expected) == 12
    for sample, other in zip(found, expected, strict=True):
        assert (sample.stage, sample.step, sample.text) == (other.stage, other.step, other.text)
        assert len(sample.pictures) == len(other.pictures)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(2, 4, marks=pytest.mark.slow), (4, 1), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_with_another_number_of_processes(root, alone, tmp_path, before, after):
    out, settings = tmp_path / "out", {"sharding": "full"}
    document = shared_runs.STEPS * shared_runs.LANES // before + 9 // before  # in the second stage
    stopped = (root, out, settings, before - 1, document, signal.SIGINT)
    ended = start(before, shared_runs.signalled, *stopped, logs=tmp_path / "before")()
    assert [end.code for end in ended] == [130] * before
    assert "saved in" in ended[0].text
    again = run_in(after, shared_runs.train, root, out, settings, logs=tmp_path / "after")
    assert "resuming after step" in again[0].text
    assert_same_curve(out, alone)


def test_an_error_in_one_process_ends_all_and_is_said_once(root, tmp_path):
    ended = start(2, shared_runs.failing, root, tmp_path / "out", {"sharding": "full"}, 1, 5, logs=tmp_path / "logs")()
    assert [end.code for end in ended] == [1, 1]
    assert "ValueError: rank 1 has had enough" in ended[1].text
    assert "Error" not in ended[0].text


def test_a_killed_process_ends_the_others_with_a_reason_and_the_run_goes_on(root, alone, tmp_path):
    out, settings = tmp_path / "out", {"sharding": "full"}
    killed = (root, out, settings, 1, shared_runs.STEPS * 2 + 9, signal.SIGKILL)
    ended = start(2, shared_runs.signalled, *killed, logs=tmp_path / "killed")()
    assert [end.code for end in ended] == [1, -signal.SIGKILL]
    assert "ProcessLostError: another process of the run ended without a message" in ended[0].text
    again = run_in(2, shared_runs.train, root, out, settings, logs=tmp_path / "again")
    assert "resuming after step 2" in again[0].text
    assert_same_curve(out, alone)


def test_a_full_disk_in_one_process_leaves_the_old_checkpoint_and_is_said_once(root, alone, tmp_path):
    out, settings = tmp_path / "out", {"sharding": "full"}
    document = shared_runs.STEPS * 2 + 8  # of its own: step 4 of the second stage
    ended = start(2, shared_runs.without_room, root, out, settings, 1, document, logs=tmp_path / "full")()
    assert [end.code for end in ended] == [1, 1]
    said = [end.text for end in ended if "SaveError: the checkpoint of step 4 could not be written" in end.text]
    assert len(said) == 1
    assert "step-000002 is intact" in said[0]
    assert [path.name for path in (out / "two/checkpoints").iterdir() if path.suffix == ""] == ["step-000002"]
    again = run_in(2, shared_runs.train, root, out, settings, logs=tmp_path / "again")
    assert "resuming after step 2" in again[0].text
    assert_same_curve(out, alone)


def test_a_process_killed_while_it_saves_leaves_the_old_checkpoint(root, alone, tmp_path):
    out, settings = tmp_path / "out", {"sharding": "full"}
    ended = start(2, shared_runs.killed_while_saving, root, out, settings, 1, 2, logs=tmp_path / "killed")()
    assert [end.code for end in ended] == [1, -signal.SIGKILL]
    assert (out / "one/checkpoints/step-000004.partial").is_dir()
    again = run_in(2, shared_runs.train, root, out, settings, logs=tmp_path / "again")
    assert "ignoring the half-written checkpoint" in again[0].text
    assert "resuming after step 2" in again[0].text
    assert_same_curve(out, alone)


def test_all_processes_skip_a_step_that_is_not_finite_in_one(root, tmp_path):
    lanes = shared_runs.LANES
    # The last lane of the second step, whichever process runs it.
    shared_runs.poisoned(root, tmp_path / "alone", {"on_nonfinite": "skip"}, 0, (2 * lanes,))
    settings = {"on_nonfinite": "skip", "sharding": "full"}
    run_in(2, shared_runs.poisoned, root, tmp_path / "out", settings, 1, (lanes,), logs=tmp_path / "logs")
    assert [line["skipped_steps"] for line in metrics(tmp_path / "out")[:4]] == [0, 1, 0, 0]
    assert_same_curve(tmp_path / "out", tmp_path / "alone")


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_the_lanes_of_all_stored(root, tmp_path):
    out = tmp_path / "out"
    ended = start(2, shared_runs.poisoned, root, out, {"sharding": "full"}, 1, (3,), logs=tmp_path / "logs")()
    assert [end.code for end in ended] == [1, 1]
    assert "NonFiniteLossError: stage one, step 2: the loss is not finite (language nan" in ended[0].text
    assert "Error" not in ended[1].text
    about, batches = load_stored_batch(out / "one/bad_batch_step_000002.pt")
    assert about["step"] == 2
    assert len(batches) == shared_runs.LANES


ELASTIC = """
import sys
from pathlib import Path
from tests.training.shared_runs import killed_once
killed_once(Path(sys.argv[1]), Path(sys.argv[2]), {"sharding": "full"}, 21)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_process_was_killed(root, alone, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(ELASTIC)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    ended = subprocess.run(
        [*torchrun, str(script), str(root), str(tmp_path / "out")],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "resuming after step 2" in ended.stdout
    assert_same_curve(tmp_path / "out", alone)


def test_processes_that_cannot_share_the_lanes_are_refused(root, tmp_path):
    ended = start(3, shared_runs.train, root, tmp_path / "out", {}, logs=tmp_path / "logs")()
    assert [end.code for end in ended] == [1, 1, 1]
    said = [end for end in ended if "3 processes cannot share 4 micro-batches evenly" in end.text]
    assert len(said) == 1


def test_groups_must_divide_the_processes():
    settings = RunSettings(sharding="hybrid", shard_size=4)
    with pytest.raises(ValueError, match="6 processes do not divide into groups of shard_size 4"):
        make_mesh(settings, Processes(0, 6, torch.device("cpu")))
