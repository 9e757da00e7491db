"""Triton kernels on the CPU, in a process of their own: TRITON_INTERPRET is read when a kernel is decorated."""

import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from dreamkernels.testing import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETING:
        for item in items:
            if item.path.is_relative_to(os.path.dirname(__file__)):
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs a process of its own: TRITON_INTERPRET=1 pytest tests/kernels/interpreter"
                    )
                )
