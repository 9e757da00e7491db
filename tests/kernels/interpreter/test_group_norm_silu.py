"""The Triton kernels of group_norm_silu, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import group_norm_silu
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.group_norm_silu import LAYOUTS, inputs, reference
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

# The last one of either layout takes several chunks of positions; channels first it is too large for one program.
CASES = [
    *(("first", *case) for case in (((2, 4, 3, 5), 4), ((2, 70, 5, 13), 7), ((0, 8, 4, 4), 2), ((1, 8, 65, 80), 2))),
    *(("last", *case) for case in (((2, 4, 3, 5), 4), ((2, 70, 5, 13), 7), ((1, 8, 13, 40), 2))),
]


def ours(groups, activation="silu"):
    def run(x, weight=None, bias=None, shift=None):
        return group_norm_silu(x, groups, weight, bias, 1e-5, activation, shift, "triton")

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("layout", "shape", "groups"), CASES, ids=str)
def test_is_as_exact_as_eager(layout, dtype, shape, groups):
    make = lambda: inputs(shape, dtype, layout)  # noqa: E731
    elements = torch.Size(shape).numel()
    assert_close_to_float64(ours(groups), reference(groups), make, 8 if elements < 1000 else 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_activation_and_without_parameters(layout):
    for count in (1, 2, 4):
        make = lambda count=count: inputs((2, 24, 5, 7), torch.float32, layout)[:count]  # noqa: E731
        assert_close_to_float64(ours(3, "none"), reference(3, "none"), make, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_does_not_cancel(layout):
    x, weight, bias, shift = (t.detach() for t in inputs((1, 8, 65, 80), torch.float32, layout, mean=1000.0))
    exact = reference(2)(*(t.double() for t in (x, weight, bias, shift)))
    # The mean is a float32: half a unit of 1000 is 3e-5, and the shifted mean of each channel is rounded once more.
    torch.testing.assert_close(ours(2)(x, weight, bias, shift).double(), exact, rtol=0, atol=3e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_needed_gradients_are_made(layout):
    arguments = inputs((2, 12, 6, 5), torch.float32, layout)
    gradient = torch.randn(2, 12, 6, 5)
    every = torch.autograd.grad(ours(4)(*arguments), arguments, gradient)
    for k, expected in enumerate(every):
        alone = [t.detach() for t in arguments]
        alone[k].requires_grad_()
        (found,) = torch.autograd.grad(ours(4)(*alone), alone[k], gradient)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration_and_compilation(layout):
    x, weight, bias, shift = inputs((2, 12, 3, 5), torch.bfloat16, layout)
    check_operator(OPERATORS["group_norm_silu"].overloads["triton"], [(x, shift, weight, bias, 3, 1e-5, True)])
    plain = [t.detach() for t in (x, x, shift, weight, bias)]
    statistics = torch.zeros(2, 3), torch.ones(2, 3)
    check_operator(
        OPERATORS["group_norm_silu_backward"].overloads["triton"],
        [(*plain, *statistics, 3, True, True, True, True), (*plain, *statistics, 3, True, True, False, False)],
    )
    assert_compiles_once(ours(3), [(x, weight, bias, shift)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    arguments = inputs((2, 12, 6, 5), torch.bfloat16)
    gradient = torch.randn(2, 12, 6, 5).bfloat16()
    assert_repeats_bitwise(lambda: torch.autograd.grad(ours(4)(*arguments), arguments, gradient), repeats=2)
