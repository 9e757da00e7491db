"""The comparison that all operator tests share: compiled, interpreter and GPU runs differ in `implementation` only."""

from collections.abc import Callable, Sequence

import torch

from dreamkernels.testing import assert_within_eager_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def in_float64(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Float64 copies of floating tensors, requiring a gradient where the original does; others as they are."""
    return [
        t.detach().to(torch.float64).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors
    ]


def assert_close_to_float64(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    make_inputs: Callable[[], Sequence[torch.Tensor]],
    trials: int = 1,
) -> None:
    """Outputs and gradients of `function` against `reference` in float64, bounded by what `reference` makes in the
    dtype of the inputs.

    Inputs that require a gradient are differentiated, with a random gradient at every output. Small tensors need
    several trials: the largest of a handful of rounding errors is luck, for eager as for us.
    """
    actual, eager, exact = [], [], []
    for _ in range(trials):
        arguments = make_inputs()
        outputs, found, gradients = differentiated(function, arguments, None)
        actual.append([*outputs, *found])
        eager.append(_results(reference, arguments, gradients))
        exact.append(_results(reference, in_float64(arguments), gradients))
    names = [*(f"output {k}" for k in range(len(outputs))), *(f"gradient {k}" for k in range(len(found)))]
    for k, name in enumerate(names):
        stacked = [torch.stack([trial[k].detach() for trial in results]) for results in (actual, eager, exact)]
        assert_within_eager_error(*stacked, what=name)


def differentiated(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    arguments: Sequence[torch.Tensor],
    gradients: list[torch.Tensor] | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, gradients of the arguments that require one, and the gradients given at the outputs (None: random)."""
    result = function(*arguments)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    if gradients is None:
        gradients = [torch.randn_like(output) for output in outputs]
    wanted = [t for t in arguments if t.requires_grad]
    matching = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    return outputs, list(torch.autograd.grad(outputs, wanted, matching)) if wanted else [], gradients


def _results(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    arguments: Sequence[torch.Tensor],
    gradients: list[torch.Tensor],
) -> list[torch.Tensor]:
    outputs, found, _ = differentiated(function, arguments, gradients)
    return [*outputs, *found]


def assert_summed(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """`actual` is a float32 sum of so many products, in any order, rounded to its dtype (Higham 2002, section 3.1)."""
    summing = terms * 2.0**-24 * magnitude
    rounding = torch.finfo(actual.dtype).eps / 2 * (exact.abs() + summing)
    assert ((actual.double() - exact).abs() <= summing + rounding).all()
