"""What a run prints, and how signals reach it."""

from __future__ import annotations

import io
import re
import signal
import threading

import pytest
from rich.console import Console

from dreamllm.training import read_metrics, run
from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.progress import StageProgress, describe_line
from tests.training.runs import config, quiet_run


def test_a_run_without_a_terminal_prints_a_few_plain_lines(root, tmp_path):
    printed = quiet_run(config(root, tmp_path, log_every=1)).splitlines()
    assert len([line for line in printed if line.startswith("one step ")]) == 5
    assert all("\x1b" not in line for line in printed)
    assert "tok/s" in printed[0]
    assert "peak" not in printed[0]
    assert printed[-1] == f"the model is in {tmp_path / 'model'}"


def test_a_terminal_shows_a_bar_with_losses_and_remaining_time():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with StageProgress(console, "stage2", steps=10, done=4) as progress:
        progress.advance()
        progress.show(5, "lm 1.234 vm 0.567")
    for expected in ("stage2", "5/10", "lm 1.234 vm 0.567", "left"):
        assert expected in text.getvalue()


LINE = {
    "lm_loss": 1.2345, "vm_loss": 0.5678, "tokens": 512_000, "pictures": 1200, "documents": 8120, "seconds": 100.0,
    "data_seconds": 3.2, "memory_bytes": 61.5 * 2**30, "operations": 10**17, "share_of_peak": 0.613,
}  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_of_any_width_shows_a_bar_and_one_line_below_it(width):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system=None)
    with StageProgress(console, "stage1_comprehension", steps=120_000, done=45_678) as progress:
        progress.advance()
        progress.show(45_679, describe_line(LINE))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines()
    bar, below = [line.strip("\r") for line in lines if line.strip()][-2:]
    assert max(len(bar), len(below)) <= width
    assert "stage1_comprehension" in bar
    assert "45679/120000" in bar
    assert "left" in bar
    shown = "lm 1.234  vm 0.568  5,120 tok/s  12.0 drawn/s  61% of peak  data 3%  61.5 GiB"
    assert below.rstrip() == (shown if width == 80 else f"{shown}  81.2 docs/s")


def test_without_a_known_peak_the_line_says_operations_per_second():
    assert "  1e+03 TFLOP/s  " in describe_line(LINE | {"share_of_peak": None})
    assert "FLOP" not in describe_line(LINE | {"share_of_peak": None, "operations": 0})


def test_the_share_of_peak_is_what_the_steps_needed_over_what_the_devices_could_do(root, tmp_path):
    made = config(root, tmp_path, log_every=1)
    run(made, Console(file=io.StringIO()), peak=lambda device, precision: 1e9)
    lines = read_metrics(tmp_path)
    assert all(line["operations"] > 0 for line in lines)
    for line in lines:
        if line["seconds"] > 0.05:
            assert line["share_of_peak"] == pytest.approx(line["operations"] / line["seconds"] / 1e9, rel=0.02)


@pytest.fixture
def keyboard_interrupts():
    """Python's own handler, which a test process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard_interrupts")
def test_the_first_signal_is_a_request_and_the_second_acts():
    with InterruptRequest() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with InterruptRequest():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def inside() -> None:
        with InterruptRequest() as interrupt:
            seen.append(interrupt.requested)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [False]
