"""A run that is stopped anywhere and rerun ends with the same bits as one that is not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreamllm.training import ConfigurationChangedError, TrainingInterrupted
from tests.training.runs import DOCUMENTS, STEPS, assert_same_result, config, metrics, quiet_run, weights, write_start

REPOSITORY = Path(__file__).parents[2]


def signal_at(document: int, number: int = signal.SIGINT):
    return lambda count: signal.raise_signal(number) if count == document else None


@pytest.mark.parametrize("step", [0, 5, 11, 13, 19, 22])
def test_a_run_interrupted_in_any_step_ends_with_the_same_bits(root, reference, tmp_path, step):
    with pytest.raises(TrainingInterrupted) as stopped:
        quiet_run(config(root, tmp_path, hook=signal_at(step * DOCUMENTS + 1)))
    assert stopped.value.code == 130
    quiet_run(config(root, tmp_path))
    assert_same_result(tmp_path, reference)


def test_a_run_can_be_interrupted_again_and_again(root, reference, tmp_path):
    for _ in range(50):
        try:
            quiet_run(config(root, tmp_path, hook=signal_at(3 * DOCUMENTS)))
            break
        except TrainingInterrupted:
            continue
    assert_same_result(tmp_path, reference)


SCRIPT = """
import sys
from pathlib import Path
from dreamllm.training import run
from tests.training.runs import config
run(config(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_at_a_random_moment_resumes_exactly(root, reference, tmp_path, number):
    lines = random.Random(int(number)).randint(1, 2 * STEPS // 3 - 2)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root), str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, output
        assert "rerun the same command to resume" in output
        assert "saved in" in output or "stopped after one" in output
    quiet_run(config(root, tmp_path))
    assert_same_result(tmp_path, reference)


def test_the_number_of_workers_does_not_change_the_result(root, reference, tmp_path):
    quiet_run(config(root, tmp_path, workers=2))
    assert_same_result(tmp_path, reference)


def stopped_run(root, out: Path, step: int) -> None:
    with pytest.raises(TrainingInterrupted):
        quiet_run(config(root, out, hook=signal_at(step * DOCUMENTS)))


def test_a_half_written_checkpoint_is_ignored_with_a_message(root, reference, tmp_path):
    stopped_run(root, tmp_path, 5)
    (tmp_path / "one/checkpoints/step-000008.partial").mkdir()
    (tmp_path / "one/checkpoints/step-000008.partial/__0_0.distcp").write_bytes(b"begun")
    printed = quiet_run(config(root, tmp_path))
    assert "ignoring the half-written checkpoint" in printed
    assert "resuming after step 6" in printed
    assert_same_result(tmp_path, reference)


@pytest.mark.parametrize("damage", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(root, reference, tmp_path, damage):
    stopped_run(root, tmp_path, 5)
    newest = tmp_path / "one/checkpoints/step-000006"
    whole = (newest / damage).read_bytes()
    (newest / damage).write_bytes(whole[: len(whole) // 2])
    printed = quiet_run(config(root, tmp_path))
    assert f"ignoring the damaged checkpoint {newest}" in printed
    assert "resuming after step 4" in printed
    assert_same_result(tmp_path, reference)


def test_a_complete_stage_is_not_run_again(root, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    model = tmp_path / "out/model/model.safetensors"
    before = model.stat().st_mtime_ns

    def refuse(count: int) -> None:
        raise AssertionError("data were read")

    printed = quiet_run(config(root, tmp_path / "out", hook=refuse))
    assert "one is complete\ntwo is complete" in printed
    assert model.stat().st_mtime_ns == before
    assert_same_result(tmp_path / "out", reference)


def test_another_configuration_in_the_same_folder_names_the_fields(root, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    with pytest.raises(ConfigurationChangedError, match=r"settings\.precision: \"float32\" there, \"bfloat16\" now"):
        quiet_run(config(root, tmp_path / "out", precision="bfloat16"))
    changed = config(root, tmp_path / "out")
    object.__setattr__(changed.stages[1], "learning_rate", 5.0)
    with pytest.raises(ConfigurationChangedError, match=r"stages\.two\.learning_rate: 0\.001 there, 5\.0 now"):
        quiet_run(changed)
    quiet_run(config(root, tmp_path / "out", workers=1, checkpoint_every=5, keep_checkpoints=1))


def test_only_the_newest_checkpoints_are_kept_and_none_of_a_complete_stage(root, tmp_path):
    stopped_run(root, tmp_path, 10)
    kept = sorted(path.name for path in (tmp_path / "one/checkpoints").iterdir())
    assert kept == ["step-000008", "step-000011"]
    quiet_run(config(root, tmp_path))
    assert not (tmp_path / "one/checkpoints").exists()


def test_earlier_stage_models_can_be_left_out(root, reference, tmp_path):
    quiet_run(config(root, tmp_path, keep_stage_models=False))
    assert not (tmp_path / "one/model").exists()
    assert metrics(tmp_path) == metrics(reference)
    assert "two is complete" in quiet_run(config(root, tmp_path, keep_stage_models=False))


ELSEWHERE = """
import sys, time
from pathlib import Path
seconds = [2e9]
def backwards():
    seconds[0] -= 3600
    return seconds[0]
time.time = backwards
from tests.training.test_resume import short_run
short_run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def short_run(root: Path, out: Path) -> None:
    whole = config(root, out, log_every=1, checkpoint_every=2)
    quiet_run(replace(whole, stages=(replace(whole.stages[1], steps=4),)))


def test_clock_time_zone_and_locale_do_not_change_a_run(tmp_path):
    """A clock that runs backwards, another zone, ASCII as the encoding of files, another hash seed."""
    root = write_start(tmp_path / "start")
    for number, caption in enumerate(("Straße", "狐と雪", "naïve café", "снег")):
        (root / f"data/{number}.txt").write_text(caption, encoding="utf-8")
        (root / f"data/{number + 4}.png").write_bytes(b"broken")  # so that messages hold names, too
    ascii_files = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    elsewhere = {**ascii_files, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "2"}
    command = [sys.executable, "-c", ELSEWHERE, str(root), str(tmp_path / "there")]
    environment = {**os.environ, **elsewhere}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    short_run(root, tmp_path / "here")
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")
    ours, theirs = weights(tmp_path / "there/model"), weights(tmp_path / "here/model")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
