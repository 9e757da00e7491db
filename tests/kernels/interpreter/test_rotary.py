"""The Triton kernel of rotary, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import rotary
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.rotary import CASES, Case, expected, states, tables

# 200 columns: a half that is no power of two.
ALL = (*CASES, Case(tokens=9, q_heads=5, k_heads=3, width=208, rotated=200, positions="batch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_is_as_exact_as_eager(case, dtype):
    cos, sin, position_ids = tables(case, dtype, positions_dtype=torch.int32 if case.batch % 2 else torch.int64)

    def run(q, k):
        return rotary(q, k, cos, sin, position_ids, layout=case.layout, implementation="triton")

    repeats = max(1, min(8, 512 // max(1, case.tokens * case.batch * case.rotated)))
    assert_close_to_float64(run, expected(case, cos, sin, position_ids), lambda: states(case, dtype), repeats)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_agrees_with_the_compiled_cpu_kernel_to_the_last_rounding(dtype):
    case = Case(tokens=9, width=72, rotated=64, positions="batch")
    cos, sin, position_ids = tables(case, dtype)
    q, k = (x.detach() for x in states(case, dtype))
    found = rotary(q, k, cos, sin, position_ids, implementation="triton")
    for ours, compiled in zip(found, rotary(q, k, cos, sin, position_ids), strict=True):
        assert ours.stride() == compiled.stride()
        # The order of fma differs: one float32 rounding of the larger product, which may tip the last rounding.
        slack = torch.finfo(dtype).eps * compiled.abs().float() + 1e-6
        assert ((ours.float() - compiled.float()).abs() <= slack).all()


def test_in_place_gives_the_same_bits():
    case = Case(tokens=6, width=24, rotated=16, positions="shared")
    cos, sin, position_ids = tables(case, torch.bfloat16)
    q, k = (x.detach() for x in states(case, torch.bfloat16))
    wanted = rotary(q, k, cos, sin, position_ids, implementation="triton")
    found = rotary(q, k, cos, sin, position_ids, inplace=True, implementation="triton")
    assert found[0] is q
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_position_outside_the_tables_is_the_nearest_row():
    """Documented behaviour on CUDA, where checking would stop the host: no read outside the tables."""
    case = Case("thd", tokens=4, positions="shared")
    cos, sin, _ = tables(case, torch.float32)
    q, k = (x.detach() for x in states(case, torch.float32))
    far = torch.tensor([-5, 0, len(cos), 2**40])
    near = torch.tensor([0, 0, len(cos) - 1, len(cos) - 1])
    found = rotary(q, k, cos, sin, far, implementation="triton")
    wanted = rotary(q, k, cos, sin, near, implementation="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_offsets_beyond_32_bits():
    """Strides of 2^32 elements, over memory of which only the rows themselves are ever touched."""
    storage = torch.empty(2**32 + 2**12, dtype=torch.bfloat16)
    cos, sin, _ = tables(Case(tokens=2, rotated=16), torch.bfloat16)
    small = torch.randn(2, 2, 16).bfloat16()
    for strides in ((2**32, 64, 1), (64, 2**32, 1)):
        q = storage.as_strided((2, 2, 16), strides)
        q.copy_(small)
        found = rotary(q, q.clone(), cos, sin, implementation="triton")[0]
        assert torch.equal(found, rotary(small, small, cos, sin, implementation="triton")[0])
        with torch.no_grad():
            rotary(q, small.clone(), cos, sin, inplace=True, implementation="triton")
        assert torch.equal(q, found)


def test_registration_and_compilation():
    case = Case(positions="batch")
    cos, sin, position_ids = tables(case, torch.bfloat16)
    q, k = states(case, torch.bfloat16)
    rest = (cos, sin, position_ids, True)
    check_operator(OPERATORS["rotary"].overloads["triton"], [(q, k, *rest)])
    check_operator(OPERATORS["rotary_backward"].overloads["triton"], [(q.detach(), k.detach(), *rest)])
    check_operator(OPERATORS["rotary_"].overloads["triton"], [(q.detach(), k.detach(), *rest)])

    def run(q, k):
        return rotary(q, k, cos, sin, position_ids, implementation="triton")

    assert_compiles_once(run, [(q, k)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    case = Case("thd", tokens=20, positions="shared")
    cos, sin, position_ids = tables(case, torch.bfloat16)
    q, k = states(case, torch.bfloat16)
    gradients = torch.randn_like(q), torch.randn_like(k)

    def everything():
        results = rotary(q, k, cos, sin, position_ids, implementation="triton")
        return torch.autograd.grad(results, [q, k], gradients)

    assert_repeats_bitwise(everything, repeats=2)
