"""The Triton kernels of layer_norm, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import layer_norm
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.layer_norm import inputs, reference, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

SHAPES = ((0, 8), (3, 2), (9, 7), (2, 3, 130), (5, 1030))


def run(x, weight, bias):
    return layer_norm(x, weight, bias, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(shape, dtype):
    assert_close_to_float64(run, reference, lambda: inputs(shape, dtype), min(8, trials(shape)))


def test_weight_and_bias_may_be_absent():
    x, weight, _ = inputs((9, 70), torch.float32)
    assert_close_to_float64(lambda x, w: run(x, w, None), lambda x, w: reference(x, w, None), lambda: [x, weight])
    assert_close_to_float64(lambda x: run(x, None, None), lambda x: reference(x, None, None), lambda: [x])


def test_strided_inputs():
    x, weight, bias = inputs((6, 4, 48), torch.bfloat16)
    assert_close_to_float64(run, reference, lambda: [x.transpose(0, 1), weight, bias])


def test_registration_and_compilation():
    x, weight, bias = inputs((3, 40), torch.bfloat16)
    check_operator(OPERATORS["layer_norm"].overloads["triton"], [(x, weight, bias, 1e-5)])
    plain = [x.detach(), x.detach(), weight.detach()]
    check_operator(OPERATORS["layer_norm_backward"].overloads["triton"], [(*plain, 1e-5, True)])
    assert_compiles_once(run, [(x, weight, bias)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    arguments = inputs((40, 33), torch.bfloat16)
    gradient = torch.randn(40, 33).bfloat16()
    assert_repeats_bitwise(lambda: torch.autograd.grad(run(*arguments), arguments, gradient), repeats=2)
