"""Shared by all tests: thread counts, the seed, GPU skips, and the guard against torchvision."""

import importlib.util
import os

# Read by OpenMP when torch loads it. Waiting threads must sleep: with another busy process on the cores, spinning
# costs whole time slices.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if importlib.util.find_spec("torchvision") is not None:
        pytest.exit(
            "torchvision is installed; its wheel breaks transformers with CPU torch: pip uninstall torchvision",
            2,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)
    return 0
