"""The Triton kernels of attention, run by the interpreter on CPU tensors. Its cost is per program: few, large tiles."""

import pytest
import torch

from dreamkernels import attention
from dreamkernels.ops.attention.triton import head_parts
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.attention import CASES, Problem, pairs
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


def check(problem, dtype, trials):
    assert_close_to_float64(problem.run("triton"), problem.reference(), lambda: problem.inputs(dtype), trials)


@pytest.mark.parametrize("case", CASES)
def test_is_as_exact_as_eager(case):
    check(CASES[case], torch.bfloat16, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(pairs(70, 3), 2, 1, 64, causal=True, prefix=(40, 3)),
        Problem(((40, 65),), 1, 1, 40, packed=False, softcap=0.7, window=20),
    ],
    ids=["causal", "window"],
)
def test_other_dtypes_are_as_exact_as_eager(dtype, problem):
    check(problem, dtype, 3)


def test_head_widths_are_padded_as_little_as_tensor_cores_allow():
    found = {
        width: head_parts(width, split=True) for width in (1, 16, 20, 32, 40, 64, 72, 80, 96, 112, 128, 160, 200, 256)
    }
    assert found == {
        1: (16, 0),
        16: (16, 0),
        20: (32, 0),
        32: (32, 0),
        40: (32, 16),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
        96: (64, 32),
        112: (128, 0),
        128: (128, 0),
        160: (128, 32),
        200: (256, 0),
        256: (256, 0),
    }
    assert [head_parts(width, split=False) for width in (1, 40, 96, 128)] == [(16, 0), (64, 0), (128, 0), (128, 0)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 63, 64, 65, 200])
def test_every_split_of_full_and_masked_blocks(causal, window):
    """Windows around the tile sizes; a block taken for full, or left out, would show at once."""
    problem = Problem(((150, 190), (190, 131)), 1, 1, 16, causal=causal, window=window)
    q, k, v = problem.inputs(torch.float32)
    out, lse = problem.run("triton")(q, k, v)
    expected, expected_lse = problem.reference()(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_a_sequence_does_not_notice_what_it_is_packed_with():
    problem = Problem(((40, 61), (0, 3), (77, 77)), 2, 1, 32, causal=True)
    q, k, v = problem.inputs(torch.bfloat16)
    out, _ = problem.run("triton")(q, k, v)
    alone, _ = Problem(((77, 77),), 2, 1, 32, causal=True).run("triton")(q[40:], k[64:], v[64:])
    assert torch.equal(out[40:], alone)


def test_constant_keys_get_no_gradient_and_change_no_other():
    lengths, kept = pairs(90, 20), torch.ones(110, dtype=torch.bool)
    kept[:70] = False
    q, k, v = Problem(lengths, 2, 1, 32).inputs(torch.float32)
    full, part = (
        torch.autograd.grad(problem.run("triton", False)(q, k, v).square().sum(), [q, k, v])
        for problem in (Problem(lengths, 2, 1, 32), Problem(lengths, 2, 1, 32, prefix=(70, 0)))
    )
    assert torch.equal(full[0], part[0])
    for whole, rest in zip(full[1:], part[1:], strict=True):
        assert torch.equal(whole[kept], rest[kept])
        assert not rest[~kept].any()


def test_registration_and_compilation():
    problem = CASES["queries over a cache"]
    q, k, v = problem.inputs(torch.bfloat16)
    given = problem.options()
    cu_seqlens = (given["cu_seqlens_q"], given["cu_seqlens_k"], given["constant_kv_prefix"])
    options = (*cu_seqlens, given["max_seqlen_q"], given["max_seqlen_k"], True, 0.1, -1, 0.0)
    check_operator(OPERATORS["attention"].overloads["triton"], [(q, k, v, *options)])
    plain = [t.detach() for t in (q, k, v)]
    out, lse = OPERATORS["attention"].overloads["triton"](*plain, *options)
    backward = OPERATORS["attention_backward"].overloads["triton"]
    check_operator(backward, [(torch.randn_like(out), None, *plain, out, lse, *options)])

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, prefix):
        return attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, 64, 130, True, constant_kv_prefix=prefix, implementation="triton"
        )

    assert_compiles_once(run, [(q, k, v, *cu_seqlens)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    problem = Problem(pairs(70), 2, 1, 40, causal=True)
    inputs = problem.inputs(torch.bfloat16)
    gradient = torch.randn_like(inputs[0])
    assert_repeats_bitwise(
        lambda: torch.autograd.grad(problem.run("triton", False)(*inputs), inputs, gradient), repeats=2
    )


def test_a_head_that_is_too_wide_is_named():
    q = torch.zeros(1, 4, 1, 129)
    with pytest.raises(ValueError, match="heads are at most 128 wide"):
        attention(q, q, q, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nothing_to_do(dtype):
    q = torch.zeros(0, 5, 2, 16, dtype=dtype, requires_grad=True)
    out, lse = attention(q, q, q, return_lse=True, implementation="triton")
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 5)
    out.sum().backward()
    assert q.grad.shape == q.shape
