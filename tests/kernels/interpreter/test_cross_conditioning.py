"""The Triton kernels of cross_conditioning, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import cross_conditioning
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.cross_conditioning import inputs, reference
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

# Few programs, all branches: several blocks and pictures per condition, odd keys, padded widths.
SMALL = ((0, 1, 5, 1, 4, 8), (1, 1, 1, 1, 1, 1), (4, 2, 70, 1, 64, 64), (2, 1, 33, 1, 33, 40))
LARGE = ((2, 1, 33, 1, 77, 40), (1, 1, 20, 1, 64, 160), (1, 1, 20, 1, 128, 80))  # too large for float32's backward
CASES = [(case, dtype) for case in SMALL for dtype in DTYPES] + [(case, torch.bfloat16) for case in LARGE]


def run(q, k, v, scale=None):
    return cross_conditioning(q, k, v, scale, "triton")


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda value: dtype_name(value) or str(value))
def test_is_as_exact_as_eager(case, dtype):
    repeats = 8 if case[2] < 30 else 1
    assert_close_to_float64(run, reference, lambda: inputs(case, dtype), repeats)


def test_more_blocks_than_chunks(monkeypatch):
    """Chunks of several blocks, the last one shorter, over several pictures of one condition."""
    from dreamkernels.ops.cross_conditioning import triton as kernels

    parameters = {"block_positions": 16, "programs": 3, "num_warps": 4, "block_elements": 128}
    monkeypatch.setattr(kernels, "launch_parameters", lambda *_: parameters)  # of both kernels
    assert_close_to_float64(run, reference, lambda: inputs((3, 1, 70, 1, 20, 24), torch.float32))


def test_float16_logits_beyond_its_range_are_finite():
    q, k, v = (t.detach() for t in inputs((1, 1, 4, 1, 9, 64), torch.float16))
    assert run(torch.full_like(q, 60000.0), k.sign() * 1000, v).isfinite().all()


def test_a_head_that_fits_no_multiprocessor_is_named():
    q, k, v = (t.detach() for t in inputs((1, 1, 4, 1, 128, 160), torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"128 keys of width 160 .* not supported by cross_conditioning_forward on sm_80"
    ):
        run(q, k, v)


def test_only_needed_gradients_are_made():
    q, k, v = (t.detach() for t in inputs((2, 1, 30, 2, 16, 24), torch.float32))
    backward = OPERATORS["cross_conditioning_backward"].overloads["triton"]
    both = backward(q, q, k, v, 0.2, True, True)
    only_q, only_kv = backward(q, q, k, v, 0.2, True, False), backward(q, q, k, v, 0.2, False, True)
    assert torch.equal(only_q[0], both[0])
    assert torch.equal(only_kv[1], both[1])
    assert torch.equal(only_kv[2], both[2])
    assert only_q[1].numel() == only_q[2].numel() == only_kv[0].numel() == 0


def test_views_of_projections():
    wide_q, wide_kv = torch.randn(2, 50, 96), torch.randn(2, 20, 500)
    q = wide_q.unflatten(-1, (3, 32)).requires_grad_()
    k = wide_kv[:, 2:18, 100:196].unflatten(-1, (3, 32)).requires_grad_()
    v = wide_kv[:, 2:18, 196:292].unflatten(-1, (3, 32)).requires_grad_()
    assert_close_to_float64(run, reference, lambda: [q, k, v])


def test_registration_and_compilation():
    q, k, v = inputs((2, 1, 7, 2, 5, 8), torch.bfloat16)
    check_operator(OPERATORS["cross_conditioning"].overloads["triton"], [(q, k, v, 0.3)])
    plain = [t.detach() for t in (q, k, v)]
    check_operator(OPERATORS["cross_conditioning_backward"].overloads["triton"], [(plain[0], *plain, 0.3, True, True)])
    assert_compiles_once(run, [(q, k, v)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    q, k, v = inputs((2, 1, 40, 1, 16, 24), torch.bfloat16)
    gradient = torch.randn_like(q)
    assert_repeats_bitwise(lambda: torch.autograd.grad(run(q, k, v), (q, k, v), gradient), repeats=2)
