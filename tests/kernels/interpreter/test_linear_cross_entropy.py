"""The Triton kernels of linear_cross_entropy, run by the interpreter on CPU tensors."""

from functools import partial

import pytest
import torch

from dreamkernels import linear_cross_entropy
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.linear_cross_entropy import IGNORED, assert_as_exact_as_eager, inputs, trials
from tests.support.operators import DTYPES, dtype_name

SHAPES = ((0, 5, 3), (1, 1, 1), (37, 101, 24), (140, 300, 70))
VARIANTS = ({}, {"reduction": "none"}, {"reduction": "sum", "softcap": 2.0, "z_loss": 0.01})
run = partial(linear_cross_entropy, implementation="triton")


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(shape, dtype, variant):
    if "softcap" in variant and shape[2] == 1:
        pytest.skip("products of width 1 round nothing away: this would compare two tanh to the last digit")
    assert_as_exact_as_eager(run, lambda: inputs(shape, dtype), min(16, trials(shape)), **variant)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("chunk", [1, 16, 50])
def test_the_chunk_changes_nothing_beyond_rounding(dtype, chunk):
    """With half of the rows ignored the last chunks have no rows: the one before them must round the sums."""
    shape = (9, 40, 20) if chunk == 1 else (90, 150, 40)
    assert_as_exact_as_eager(partial(run, chunk=chunk), lambda: inputs(shape, dtype, ignored=0.5))


@pytest.mark.parametrize("chunk", [None, 16])
def test_without_any_target_loss_and_gradients_are_zero(chunk):
    hidden, weight, targets = inputs((40, 30, 8), torch.bfloat16, ignored=1.1)
    loss = run(hidden, weight, targets, chunk=chunk)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(loss, hidden, weight))


def test_agrees_with_the_compiled_cpu_kernels():
    hidden, weight, targets = inputs((60, 200, 32), torch.float32)
    ours, compiled = run(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, compiled)
    torch.testing.assert_close(gradients(ours, hidden, weight), gradients(compiled, hidden, weight))


def test_what_stands_in_ignored_rows_does_not_matter():
    hidden, weight, targets = inputs((40, 50, 16), torch.float32)
    broken = torch.where((targets == IGNORED)[:, None], torch.nan, hidden.detach()).requires_grad_()
    expected, loss = run(hidden, weight, targets), run(broken, weight, targets)
    assert torch.equal(loss, expected)
    for found, wanted in zip(gradients(loss, broken, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.equal(found, wanted)


def test_a_target_out_of_range_is_a_row_without_target_logit():
    hidden, weight, targets = inputs((5, 30, 8), torch.float32, ignored=0.0)
    targets[1], targets[3] = 30, -7
    losses = run(hidden, weight, targets, reduction="none")
    lse = (hidden @ weight.T).logsumexp(-1)
    torch.testing.assert_close(losses[[1, 3]], lse[[1, 3]])
    torch.testing.assert_close(gradients(losses.sum(), hidden)[0][[1, 3]], gradients(lse.sum(), hidden)[0][[1, 3]])


def test_only_needed_gradients_are_made():
    hidden, weight, targets = inputs((33, 60, 16), torch.float32)
    expected = gradients(run(hidden, weight, targets), hidden, weight)
    assert torch.equal(gradients(run(hidden, weight.detach(), targets), hidden)[0], expected[0])
    assert torch.equal(gradients(run(hidden.detach(), weight, targets), weight)[0], expected[1])


def test_a_second_backward_makes_its_own_gradients():
    hidden, weight, targets = inputs((20, 50, 16), torch.float32)
    loss = run(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(-3.0))
    for mine, copy, other in zip(first, copies, second, strict=True):
        assert torch.equal(mine, copy)
        torch.testing.assert_close(other, -3.0 * copy)


def test_registration_and_compilation():
    hidden, weight, targets = inputs((20, 40, 16), torch.bfloat16)
    check_operator(
        OPERATORS["linear_cross_entropy"].overloads["triton"],
        [(hidden, weight, targets, IGNORED, 1, 0.0, 0.0, 0, True, True)],
    )
    plain = [hidden.detach(), weight.detach(), targets]
    check_operator(
        OPERATORS["linear_cross_entropy_backward"].overloads["triton"],
        [(torch.rand(20), *plain, IGNORED, 0, 0.0, 0.0, 8, True, True)],
    )
    check_operator(
        OPERATORS["linear_cross_entropy_scale"].overloads["triton"],
        [(plain[0].clone(), plain[1].clone(), torch.tensor(2.0))],
    )
    assert_compiles_once(run, [(hidden, weight, targets)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    hidden, weight, targets = inputs((40, 130, 16), torch.bfloat16)

    def everything():
        loss = run(hidden, weight, targets)
        return [loss.view(1), *gradients(loss, hidden, weight)]

    assert_repeats_bitwise(everything, repeats=2)
