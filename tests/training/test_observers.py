"""Watching a run does not change it."""

import io

from rich.console import Console

from dreamllm.monitoring import LogSettings, SampleSettings, read_samples, watching, write_run_page
from dreamllm.training import read_metrics, run
from tests.training.runs import STEPS, assert_same_result, config


class Listener:
    """Notes what it is told."""

    def __init__(self):
        self.lines, self.steps, self.closed = [], [], 0

    def line(self, line):
        self.lines.append(line)

    def needs_model(self, step):
        return False

    def after_step(self, stage, step, model, processor):
        self.steps.append((stage, step))

    def close(self):
        self.closed += 1


def test_a_run_that_is_watched_ends_with_the_same_bits(root, reference, tmp_path):
    out = tmp_path / "out"
    samples = SampleSettings(every=5, draw=["a picture"], chat=["hello"], max_new_tokens=3)
    make = watching(out, samples, LogSettings(), {})
    listener = Listener()
    run(config(root, out), Console(file=io.StringIO()), lambda main: [*make(main), listener])
    assert_same_result(out, reference)
    assert listener.lines == read_metrics(out)
    assert listener.steps == [(stage, step) for stage in ("one", "two") for step in range(1, STEPS + 1)]
    assert listener.closed == 1
    taken = [(sample.stage, sample.step) for sample in read_samples(out)]
    assert taken == [(stage, step) for stage in ("one", "two") for step in (5, 10) for _ in range(2)]
    assert "Samples</h2>" in write_run_page(out).read_text()


def test_lines_say_how_long_data_were_waited_for_and_the_memory(reference):
    for line in read_metrics(reference):
        assert 0 <= line["data_seconds"] <= line["seconds"] + 1e-3
        assert 2**20 < line["memory_bytes"] < 2**40
