"""Debug checks: tests of tensor values that stop the host, so they are off unless asked for.

    with dreamkernels.ops.debug.debug_checks():
        train_step()          # a position or label out of range raises here, and names the first offender

Without them CUDA operators never read out of bounds, but what they compute for a value out of range is unspecified;
each operator's docstring says what happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["check_range", "debug_checks", "debug_enabled", "set_debug"]

_enabled = False


def set_debug(enabled: bool) -> None:
    """Switches the debug checks of every operator in this process on or off (off at the start)."""
    global _enabled
    _enabled = bool(enabled)


def debug_enabled() -> bool:
    """Whether calls check tensor values now. Inside torch.compile they never do: the check would break the graph."""
    return _enabled and not torch.compiler.is_compiling()


@contextlib.contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Within it the debug checks are on (or off); afterwards as they were before."""
    before = _enabled
    set_debug(enabled)
    try:
        yield
    finally:
        set_debug(before)


def check_range(
    operator: str, name: str, values: torch.Tensor, low: int, high: int, also: int | None = None, meaning: str = ""
) -> None:
    """Raises ValueError, naming the first offender, unless every value is in [low, high) or equals `also`.

    Synchronises with the device; call it when `debug_enabled()`. `also` is one more allowed value, such as an ignored
    label; `meaning` ends the message: what the bound is.
    """
    outside = (values < low) | (values >= high)
    if also is not None:
        outside &= values != also
    if not bool(outside.any()):
        return
    index = [int(i) for i in outside.nonzero()[0]]
    allowed = f"{low} to {high - 1}" + ("" if also is None else f", or {also}")
    raise ValueError(
        f"{operator}: {name}{index} = {int(values[tuple(index)])} is out of range ({allowed})"
        + (f": {meaning}" if meaning else "")
    )
