"""Inputs of the linear_cross_entropy tests, and their comparison."""

import random

import torch

from dreamkernels.ops.linear_cross_entropy.reference import linear_cross_entropy as reference
from dreamkernels.testing import assert_within_eager_error
from tests.support.operators import in_float64

__all__ = ["IGNORED", "SHAPES", "assert_as_exact_as_eager", "inputs", "reference", "trials"]

IGNORED = -100
# Rows, vocabulary, width: zero, one, around the vector sizes (8, 16) and the unrolled step (64), several row blocks.
SHAPES = ((0, 5, 3), (1, 1, 1), (3, 2, 1), (9, 17, 5), (37, 101, 24), (70, 130, 33), (150, 611, 48))


def inputs(shape, dtype, device="cpu", ignored=0.3, scale=1.0):
    rows, vocabulary, width = shape
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (scale / width**0.5 * torch.randn(vocabulary, width, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    targets[torch.rand(rows, device=device) < ignored] = IGNORED
    return [hidden, weight, targets]


def trials(shape):
    """Enough repetitions that some thousand gradients are compared."""
    return max(1, min(200, 8192 // max(1, shape[0] * shape[2])))


def assert_as_exact_as_eager(function, make_inputs, trials=1, **variant):
    """Loss and gradients against float64, as `assert_close_to_float64` does, with one difference: the gradient of a
    scalar loss is a power of two. Gradients are made before it is known, so another one rounds once more; what it then
    gives has a test of its own."""
    found = {"loss": ([], [], []), "hidden": ([], [], []), "weight": ([], [], [])}
    for _ in range(trials):
        arguments = make_inputs()
        exact = in_float64(arguments)
        losses = [function(*arguments, **variant), reference(*arguments, **variant), reference(*exact, **variant)]
        upstream = torch.randn_like(losses[0])
        if upstream.dim() == 0:
            upstream.fill_(random.Random(float(arguments[0].sum())).choice((-0.5, 1.0, 4.0)))
        for kind, (loss, tensors) in enumerate(zip(losses, (arguments, arguments, exact), strict=True)):
            of_hidden, of_weight = torch.autograd.grad(loss, tensors[:2], upstream.to(loss.dtype))
            found["loss"][kind].append(loss.detach())
            found["hidden"][kind].append(of_hidden)
            found["weight"][kind].append(of_weight)
    for name, results in found.items():
        assert_within_eager_error(*(torch.stack(kind) for kind in results), what=name)
