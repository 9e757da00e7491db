"""NaN, a full disk, a folder that cannot be written, unusable data: each stops with a message and loses nothing."""

from __future__ import annotations

import json
import resource
from dataclasses import replace

import pytest
import torch

from dreamllm.data import TooManyBadSamplesError
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training import NonFiniteLossError, SaveError, load_stored_batch, read_metrics
from tests.data.pictures import png
from tests.training.runs import DOCUMENTS, STEPS, assert_same_result, config, metrics, quiet_run, weights, write_start


def poison(monkeypatch, step: int) -> None:
    """Makes the language loss of the `step`-th forward pass NaN."""
    calls = []
    original = DreamLLM.forward_packed

    def forward(self, batch, *args, **kwargs):
        output = original(self, batch, *args, **kwargs)
        calls.append(batch)
        if len(calls) == step:
            output.lm_loss = output.lm_loss * float("nan")
        return output

    monkeypatch.setattr(DreamLLM, "forward_packed", forward)


def test_nan_in_the_loss_names_the_step_and_keeps_its_batch(root, reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, step=6)
        with pytest.raises(
            NonFiniteLossError, match=r"stage one, step 6: the loss is not finite \(language nan"
        ) as error:
            quiet_run(config(root, tmp_path))
    path = tmp_path / "one/bad_batch_step_000006.pt"
    assert str(path) in str(error.value)
    about, (batch,) = load_stored_batch(path)
    assert about["step"] == 6
    assert about["stage"] == "one"
    assert len(batch.names) == DOCUMENTS
    assert batch.names[0] in str(error.value)
    model = DreamLLM.from_pretrained(root / "start")
    model.config.condition_dropout = 0.2
    assert model.forward_packed(batch).loss.isfinite()  # the stored batch can be run again
    assert [path.name for path in (tmp_path / "one/checkpoints").iterdir()] == ["step-000004"]
    quiet_run(config(root, tmp_path))  # the poison gone, from the checkpoint before it
    assert_same_result(tmp_path, reference)


def test_divergence_is_found_at_its_first_step(root, tmp_path):
    wild = config(root, tmp_path, log_every=5, checkpoint_every=100)
    stages = (replace(wild.stages[1], learning_rate=1e25, warmup_ratio=0.0, max_grad_norm=1e30, steps=10),)
    with pytest.raises(NonFiniteLossError, match=r"step [1-3]:"):
        quiet_run(replace(wild, stages=stages))


def limit_file_size(size_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))


@pytest.fixture
def unlimited_afterwards():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("unlimited_afterwards")
@pytest.mark.parametrize("room_bytes", [1_000, 20_000, 400_000])
def test_a_checkpoint_that_finds_no_room_leaves_the_old_one(root, reference, tmp_path, room_bytes):
    first = (STEPS + 6) * DOCUMENTS

    def fill_the_disk(count: int) -> None:
        if count == first:
            limit_file_size(room_bytes)

    with pytest.raises(SaveError, match=r"the checkpoint of step 8 could not be written .*step-000004 is intact"):
        quiet_run(config(root, tmp_path, hook=fill_the_disk, log_every=STEPS))
    limit_file_size(resource.RLIM_INFINITY)
    assert [path.name for path in (tmp_path / "two/checkpoints").iterdir()] == ["step-000004"]
    assert "resuming after step 4" in quiet_run(config(root, tmp_path, log_every=STEPS))
    for folder in ("one/model", "model"):
        expected = weights(reference / folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / folder).items())


@pytest.mark.usefixtures("unlimited_afterwards")
def test_a_model_that_finds_no_room_leaves_the_checkpoint_to_make_it_from(root, reference, tmp_path):
    last = 2 * STEPS * DOCUMENTS - 1

    def fill_the_disk(count: int) -> None:
        if count == last:
            limit_file_size(20_000)

    with pytest.raises(SaveError, match="the model of two could not be written"):
        quiet_run(config(root, tmp_path, hook=fill_the_disk, save_in_background=False))
    limit_file_size(resource.RLIM_INFINITY)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("model")]
    assert "resuming after step 8" in quiet_run(config(root, tmp_path))
    assert_same_result(tmp_path, reference)


def test_a_folder_that_cannot_be_made_is_an_error_at_once(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match=r"folder .*file/out cannot be written"):
        quiet_run(config(root, tmp_path / "file/out"))


def test_bad_samples_are_counted_reported_and_survive_a_resume(tmp_path):
    root = write_start(tmp_path)
    (root / "data/3.png").write_bytes(png(3)[:50])
    (root / "data/7.txt").write_text("")
    printed = quiet_run(config(root, tmp_path / "out", max_bad_fraction=0.5))
    assert "corrupt_image" in printed
    assert "3.png" in printed
    done = json.loads((tmp_path / "out/one/done.json").read_text())
    counts = done["data"]["counts"]
    assert counts["corrupt_image"] > 0
    assert counts["empty_caption"] > 0
    lines = [line for line in read_metrics(tmp_path / "out") if line["stage"] == "one"]
    assert sum(line["bad_documents"] for line in lines) == counts["corrupt_image"] + counts["empty_caption"]
    assert done["data"]["documents"] == STEPS * DOCUMENTS + sum(counts.values())


def test_data_that_are_mostly_unusable_stop_the_run(tmp_path):
    root = write_start(tmp_path)
    for i in range(10):
        (root / f"data/{i}.png").write_bytes(b"")
    unlucky = config(root, tmp_path / "out")
    stages = (replace(unlucky.stages[0], steps=100),)
    with pytest.raises(TooManyBadSamplesError, match=r"samples could not be used, more than the tolerated 10%"):
        quiet_run(replace(unlucky, stages=stages))


def test_metrics_hold_every_quantity(root, reference):
    lines = metrics(reference)
    assert [(line["stage"], line["step"]) for line in lines] == [(s, n) for s in ("one", "two") for n in (3, 6, 9, 12)]
    assert all(line["documents"] == 3 * DOCUMENTS and line["tokens"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert all(line["lr"] <= 1e-2 and "lm_loss" in line and "vm_loss" in line for line in lines)
    seconds = [line["seconds"] for line in read_metrics(reference)]
    assert all(value > 0 for value in seconds)


def test_every_stage_leaves_a_loadable_model_with_its_history(reference):
    for folder in (reference / "one/model", reference / "model"):
        model, processor = DreamLLM.from_pretrained(folder), DreamLLMProcessor.from_pretrained(folder)
        assert processor.layout == model.layout
    record = json.loads((reference / "model/training.json").read_text())
    assert record["configuration"]["kind"] == "stage2"
    assert record["steps"] == STEPS
    assert "torch" in record["versions"]
    stored = json.loads((reference / "run.json").read_text())
    assert stored["configuration"]["seed"] == 11
    assert "torch" in stored["versions"]
