"""The error bound of every operator test: a multiple of what eager PyTorch makes in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def error_of(value: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference to a float64 reference; infinite where NaN or infinity disagree."""
    if value.numel() == 0:
        return 0.0, 0.0
    value = value.detach().to(device=exact.device, dtype=torch.float64)
    same = value == exact  # also equal infinities
    difference = torch.where(same, 0.0, (value - exact).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(difference.max()), float(difference.square().mean().sqrt())


def assert_within_eager_error(
    actual: torch.Tensor | Sequence[torch.Tensor],
    eager: torch.Tensor | Sequence[torch.Tensor],
    exact: torch.Tensor | Sequence[torch.Tensor],
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """Asserts that `actual` is at most `factor` times as far from the float64 reference `exact` as `eager` is, in the
    same dtype.

    Both the largest and the root-mean-square error are compared. Where eager happens to be (almost) exact, the error
    of `exact` itself rounded to the dtype takes its place, which no implementation can beat.
    """
    if isinstance(actual, torch.Tensor):
        actual, eager, exact = [actual], [eager], [exact]  # type: ignore[list-item]
    for number, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        name = f"{what}[{number}]" if len(actual) > 1 else what
        assert a.dtype == e.dtype, f"{name} has dtype {a.dtype}, eager {e.dtype}"
        assert a.shape == e.shape == x.shape, (
            f"{name} has shape {list(a.shape)}, eager {list(e.shape)}, exact {list(x.shape)}"
        )
        assert x.dtype == torch.float64, f"the exact {name} must be float64, not {x.dtype}"
        x = x.detach()
        for kind, ours, theirs, rounding in zip(
            ("largest", "rms"), error_of(a, x), error_of(e, x), error_of(x.to(a.dtype), x), strict=True
        ):
            bound = factor * max(theirs, rounding)
            assert ours <= bound, (
                f"{kind} error of {name} ({a.dtype}, {list(a.shape)}) is {ours:.3e}: more than {factor} x "
                f"{max(theirs, rounding):.3e} (eager {theirs:.3e}, rounding alone {rounding:.3e})"
            )
