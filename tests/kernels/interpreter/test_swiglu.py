"""The Triton kernels of swiglu, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import swiglu, swiglu_packed
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.swiglu import reference
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.swiglu import inputs, packed_inputs, trials, views

SHAPES = ((0, 8), (3, 0), (1,), (9, 7), (2, 3, 130), (3, 3000))


def run(gate, up):
    return swiglu(gate, up, "triton")


def run_packed(gate_up):
    return swiglu_packed(gate_up, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(shape, dtype):
    repeats = min(8, trials(shape))
    assert_close_to_float64(run, reference.swiglu, lambda: inputs(shape, dtype), repeats)
    assert_close_to_float64(run_packed, reference.swiglu_packed, lambda: packed_inputs(shape, dtype), repeats)


@pytest.mark.parametrize("name", list(views()))
def test_views_give_the_result_of_copies(name):
    gate, up = (x.detach().requires_grad_() for x in views()[name])
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (gate, up)]
    y, wanted = run(gate, up), run(*copies)
    assert y.is_contiguous()
    assert torch.equal(y, wanted)
    gradient = torch.randn(3, 4, 10).transpose(0, 1)
    found = torch.autograd.grad(y, (gate, up), gradient)
    for a, b in zip(found, torch.autograd.grad(wanted, copies, gradient), strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits():
    storage = torch.empty(2**32 + 2**12, dtype=torch.bfloat16)
    small = torch.randn(2, 40).bfloat16()
    far = storage.as_strided((2, 40), (2**32, 1)).copy_(small)
    assert torch.equal(run(far, small), run(small, small))
    backward = OPERATORS["swiglu_backward"].overloads["triton"]
    for a, b in zip(backward(far, far, small), backward(small, small, small), strict=True):
        assert torch.equal(a, b)


def test_registration_and_compilation():
    gate, up = inputs((3, 40), torch.bfloat16)
    (gate_up,) = packed_inputs((3, 40), torch.bfloat16)
    check_operator(OPERATORS["swiglu"].overloads["triton"], [(gate, up)])
    check_operator(OPERATORS["swiglu_packed"].overloads["triton"], [(gate_up,)])
    plain = [t.detach() for t in (gate, up, gate_up)]
    check_operator(OPERATORS["swiglu_backward"].overloads["triton"], [(plain[0], plain[0], plain[1])])
    check_operator(OPERATORS["swiglu_packed_backward"].overloads["triton"], [(plain[0], plain[2])])
    assert_compiles_once(run, [(gate, up)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    gate, up = inputs((20, 33), torch.bfloat16)
    gradient = torch.randn_like(gate)
    assert_repeats_bitwise(lambda: torch.autograd.grad(run(gate, up), [gate, up], gradient), repeats=2)
