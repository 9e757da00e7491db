"""The Triton kernels of geglu, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import geglu
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.geglu import inputs, reference, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

# 1030 and 2060 take several blocks of columns, the last one partly filled.
SHAPES = ((0, 16), (3, 0), (3, 2), (9, 14), (2, 3, 260), (3, 2060))


def run(x):
    return geglu(x, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(shape, dtype):
    assert_close_to_float64(run, reference, lambda: inputs(shape, dtype), trials(shape))


def test_strided_inputs():
    assert_close_to_float64(run, reference, lambda: [inputs((48, 6), torch.bfloat16)[0].t()])


def test_registration_and_compilation():
    (x,) = inputs((3, 40), torch.bfloat16)
    check_operator(OPERATORS["geglu"].overloads["triton"], [(x,)])
    check_operator(OPERATORS["geglu_backward"].overloads["triton"], [(x.detach()[:, :20], x.detach())])
    assert_compiles_once(run, [(x,)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    (x,) = inputs((20, 66), torch.bfloat16)
    gradient = torch.randn(20, 33).bfloat16()
    assert_repeats_bitwise(lambda: torch.autograd.grad(run(x), x, gradient), repeats=2)
