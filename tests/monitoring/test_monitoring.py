"""The run's page, the samples of a model in training, and lines of metrics for other programs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamllm.cli import main
from dreamllm.inference import Assistant, Engine, GenerationOptions
from dreamllm.monitoring import Sample, SampleSettings, SampleWriter, TensorBoard, read_samples, write_run_page
from dreamllm.monitoring.loggers import scalars
from tests.tiny import tiny_model

STAGES = [{"name": "one", "steps": 40}, {"name": "two", "steps": 20}]


def line(stage: str, step: int, **values: object) -> dict:
    plain = {"steps": 10, "loss": 1.0, "lm_loss": 3.0 / step, "vm_loss": None, "lr": 1e-4, "grad_norm": 0.5}
    counts = {"tokens": 1000, "pictures": 0, "documents": 40, "bad_documents": 0, "seconds": 2.0}
    return {"stage": stage, "step": step, **plain, **counts, **values}


def write_run(folder: Path, lines: list[dict], name: str = "run") -> Path:
    """A folder as a run leaves it."""
    run = folder / name
    (run / "one").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"configuration": {"model": "start", "seed": 7, "stages": STAGES}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return run


def text_of(page: Path) -> str:
    """What stands on the page, without markup."""
    body = page.read_text().split("<body>")[1]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_page_says_where_an_unfinished_run_stands(tmp_path):
    run = write_run(tmp_path, [line("one", step) for step in (10, 20, 30)])
    text = text_of(write_run_page(run))
    assert "So far 120 documents, 3,000 tokens in 6 s of training" in text
    assert "begun" in text
    assert "30 of 40" in text
    assert "not begun" in text
    assert "0 of 20" in text
    # Ten steps are left, at 6 s for thirty.
    assert re.search(r"30 of 40\s+6 s\s+2 s\s+0\.1\b", text)


def test_the_page_has_a_curve_for_what_was_measured_and_no_other(tmp_path):
    lines = [line("one", step, vm_loss=0.25, pictures=4, memory_bytes=2**31) for step in (10, 20)]
    run = write_run(tmp_path, [*lines, line("two", 10)])
    html = write_run_page(run).read_text()
    one, two = html.split("<h2>one</h2>")[1].split("<h2>two</h2>")
    two = two.split("<h2>")[0]
    assert [f"<h3>{name}</h3>" in one for name in ("Diffusion loss", "Peak memory, GiB")] == [True, True]
    assert [f"<h3>{name}</h3>" in two for name in ("Diffusion loss", "Peak memory, GiB")] == [False, False]
    assert "Pictures created per second" not in two
    assert "Tokens per second" in two


def test_the_page_names_what_was_left_out_and_escapes_everything(tmp_path):
    run = write_run(tmp_path, [line("one", 40)], name="<b>run</b>")
    evil = "<script>alert(1)</script>"
    data = {"counts": {"corrupt_image": 3}, "examples": {"corrupt_image": [evil]}}
    (run / "one" / "done.json").write_text(json.dumps({"data": data}))
    sample = {"stage": "one", "step": 10, "prompt": evil, "text": evil, "pictures": ["gone.png"]}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = write_run_page(run)
    assert "<script" not in page.read_text()
    assert "<b>run" not in page.read_text()
    text = text_of(page)
    assert "corrupt_image 3" in text
    assert "complete" in text
    assert "gone.png cannot be read" in text


def test_folders_that_are_no_runs_and_runs_without_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no run\.json"):
        write_run_page(tmp_path)
    with pytest.raises(ValueError, match="has no metrics yet"):
        write_run_page(write_run(tmp_path, []))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tmp_path):
    picture = tmp_path / "seven.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    return SampleSettings(every=5, draw=["a red circle"], caption=[picture], chat=["draw"], max_new_tokens=4, seed=3)


def test_samples_are_the_engines_answers_to_the_same_prompts_each_time(tmp_path, tiny, settings):
    model, processor = tiny
    model.train()
    before = torch.get_rng_state()
    writer = SampleWriter(tmp_path, settings)
    for step in (4, 5, 9, 10):
        writer.after_step("one", step, model, processor)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    samples = read_samples(tmp_path)
    assert [sample.step for sample in samples] == [5, 5, 5, 10, 10, 10]
    assert [sample.prompt for sample in samples[:3]] == ["draw: a red circle", "describe: seven.png", "answer: draw"]
    model.eval()
    assistant = Assistant(Engine(model, processor))
    drawn = assistant.text_to_image("a red circle", seed=3)
    stored = Image.open(tmp_path / samples[0].pictures[0])
    assert np.array_equal(np.asarray(stored), np.asarray(drawn))
    options = GenerationOptions(4, pictures="forbid", seed=3)
    assert samples[1].text == assistant.caption(settings.caption[0], options)
    assert samples[1].pictures == ()


def test_a_resumed_run_replaces_its_samples(tmp_path, tiny, settings):
    model, processor = tiny
    for stage, step in (("one", 5), ("one", 10), ("two", 5), ("two", 10), ("two", 5)):
        SampleWriter(tmp_path, settings).after_step(stage, step, model, processor)
    steps = [(sample.stage, sample.step) for sample in read_samples(tmp_path)[::3]]
    assert steps == [("one", 5), ("one", 10), ("two", 5)]


def test_only_one_process_writes(tmp_path, tiny, settings):
    SampleWriter(tmp_path, settings, writes=False).after_step("one", 5, *tiny)
    assert read_samples(tmp_path) == []


def test_the_page_shows_samples_over_time(tmp_path):
    run = write_run(tmp_path, [line("one", 40)])
    samples = [Sample("one", step, "draw: a cat", f"text {step}", ()) for step in range(1, 41)]
    lines = [json.dumps(vars(sample)) for sample in samples]
    (run / "samples.jsonl").write_text("\n".join(lines))
    text = text_of(write_run_page(run))
    shown = [int(step) for step in re.findall(r"text (\d+)", text)]
    assert shown == [1, 9, 17, 24, 32, 40]
    assert "draw: a cat" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": -1}, "must not be negative"),
        ({"every": 5}, "nothing to sample"),
        ({"every": 5, "caption": [Path("nowhere.png")]}, "pictures of samples.caption do not exist: nowhere.png"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        SampleSettings(**values)


def test_lines_of_metrics_become_curves():
    found = scalars(line("one", 10, lm_loss=0.5, vm_loss=None, pictures=6))
    assert found["one/lm_loss"] == 0.5
    assert found["one/tokens_per_second"] == 500.0
    assert found["one/pictures_per_second"] == 3.0
    assert "one/vm_loss" not in found
    assert "one/stage" not in found


def test_tensorboard_reads_what_was_logged(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoard(tmp_path)
    for step in (10, 20):
        log.line(line("one", step))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("one/lm_loss")] == [(10, 0.3), (20, 0.15)]


def test_tensorboard_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_the_command(tmp_path, capsys):
    run = write_run(tmp_path, [line("one", 40)])
    main(["train", "report", str(run)])
    assert capsys.readouterr().out.split() == ["wrote", str(run / "run.html")]
    with pytest.raises(SystemExit):
        main(["train", "report", str(tmp_path / "nowhere")])
    assert "nowhere is not the folder of a run" in capsys.readouterr().err
