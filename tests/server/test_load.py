"""Many clients at once, by the benchmark's own means."""

import pytest

from benchmarks.serving import measure


def test_a_few_clients(model_folder):
    result = measure(model_folder, clients=6, seconds=3.0, max_queue=2, steps=1)
    assert result["errors"] == 0
    assert result["exit_status"] == 0
    assert result["statuses"]["200"] > 6
    assert not set(result["statuses"]) - {"200", "429", "left"}


@pytest.mark.slow
def test_64_clients_leave_no_memory_behind(model_folder):
    result = measure(model_folder, clients=64, seconds=120.0, max_queue=32, steps=2)
    assert result["errors"] == 0
    assert result["exit_status"] == 0
    assert result["statuses"]["429"] > 0
    assert result["memory_growth"] < 0.05
