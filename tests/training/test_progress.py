"""What a run prints, and how signals reach it."""

from __future__ import annotations

import io
import signal
import threading

import pytest
from rich.console import Console

from dreamllm.training.interrupt import InterruptRequest
from dreamllm.training.progress import StageProgress
from tests.training.runs import config, quiet_run


def test_a_run_without_a_terminal_prints_a_few_plain_lines(root, tmp_path):
    printed = quiet_run(config(root, tmp_path, log_every=1)).splitlines()
    assert len([line for line in printed if line.startswith("one step ")]) == 5
    assert all("\x1b" not in line for line in printed)
    assert "documents/s" in printed[0]
    assert printed[-1] == f"the model is in {tmp_path / 'model'}"


def test_a_terminal_shows_a_bar_with_losses_and_remaining_time():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with StageProgress(console, "stage2", steps=10, done=4) as progress:
        progress.advance()
        progress.show(5, "lm 1.234 vm 0.567")
    for expected in ("stage2", "5/10", "lm 1.234 vm 0.567", "left"):
        assert expected in text.getvalue()


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
