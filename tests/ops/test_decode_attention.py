"""decode_attention on the devices of this machine: CPU at every instruction set; Triton and CUDA C++ where there is a
GPU."""

import pytest
import torch

from dreamkernels import append_kv, decode_attention, rotary_tables
from dreamkernels.ops.debug import debug_checks
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.decode_attention import CASES, ODD_CASES, Case, make, reference, runner, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

LARGE = (
    Case(tokens=66, lengths=(1500,), width=128, q_heads=2),
    Case(tokens=1, lengths=(1500, 700), width=128, q_heads=8, kv_heads=2, page_size=64),
)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [*CASES, *ODD_CASES], ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, case):
    with using_cpu_isa(isa):
        assert_close_to_float64(runner(case), reference(case), lambda: make(case, dtype), trials(case))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_long_caches(dtype, case):
    assert_close_to_float64(runner(case), reference(case), lambda: make(case, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [*CASES, *ODD_CASES, *LARGE], ids=str)
def test_gpu_is_as_exact_as_eager(implementation, dtype, case):
    if implementation == "cuda" and (dtype == torch.float32 or case in ODD_CASES):
        pytest.skip("the CUDA C++ kernel takes 16-bit elements and heads of a multiple of 8 channels")
    chosen = runner(case, implementation)
    assert_close_to_float64(chosen, reference(case), lambda: make(case, dtype, "cuda"), trials(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_an_empty_sequence_gives_zeros(dtype):
    case = Case(lengths=(0, 3), tokens=4)
    out, lse = runner(case)(*make(case, dtype))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert torch.equal(out[1, 0], torch.zeros_like(out[1, 0]))  # the query before the first key
    assert lse[1, :, 0].isneginf().all()
    assert lse[1, :, 1:].isfinite().all()


def test_one_key_is_its_value():
    case = Case(lengths=(1, 1), width=24)
    tensors = make(case, torch.float32)
    out, lse = runner(case)(*tensors)
    assert torch.equal(out[:, 0], tensors[2][:, 0].repeat_interleave(2, 1))
    scores = (tensors[0][:, 0] * tensors[1][:, 0].repeat_interleave(2, 1)).sum(-1) * 24**-0.5
    torch.testing.assert_close(lse[..., 0], scores)


@pytest.mark.parametrize("tokens", [1, 30])
def test_large_scores_do_not_overflow(tokens):
    case = Case(tokens=tokens, lengths=(90,), scale=40.0)
    out, lse = runner(case)(*(tensors := make(case, torch.float32)))
    assert out.isfinite().all()
    assert lse.abs().max() > 500
    torch.testing.assert_close(out, reference(case)(*tensors)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 20])
def test_the_number_of_parts_changes_rounding_only(tokens):
    case = Case(tokens=tokens, lengths=(700, 41), q_heads=2)
    tensors = make(case, torch.float32)
    for splits in (2, 3, 11, 64):
        parts = runner(Case(tokens=tokens, q_heads=2, splits=splits))(*tensors)
        for a, b in zip(parts, runner(case)(*tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides(dtype):
    """Slices of a joint projection, caches with the heads before the positions, and strided channels of q."""
    case = Case(tokens=3)
    q, k_cache, v_cache, lengths = make(case, dtype)
    expected = runner(case)(q, k_cache, v_cache, lengths)
    joint = torch.cat((torch.zeros_like(q), q), 2)[:, :, q.shape[2] :]
    k_cache, v_cache = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache))
    for form in (joint, torch.stack((q, q), -1)[..., 0]):
        assert not form.is_contiguous()
        found = runner(case)(form, k_cache, v_cache, lengths)
        assert found[0].is_contiguous()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", [Case(lengths=(800, 3), splits=4), Case(tokens=40, lengths=(300, 77))], ids=str)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(case):
    tensors = make(case, torch.bfloat16)
    assert_repeats_bitwise(lambda: runner(case)(*tensors))


def test_tokens_one_by_one_see_what_tokens_at_once_see():
    """With append_kv: decoding step by step equals one call with several tokens."""
    torch.manual_seed(3)
    cos, sin = rotary_tables(16, 32)
    q, k, v = torch.randn(2, 6, 4, 32), torch.randn(2, 6, 2, 32), torch.randn(2, 6, 2, 32)

    def decode(steps):
        caches = torch.zeros(2, 2, 16, 2, 32).unbind()
        lengths = torch.tensor([3, 0], dtype=torch.int32)
        outputs = []
        for step in steps:
            turned = append_kv(q[:, step], k[:, step], v[:, step], *caches, lengths, cos, sin)
            lengths = lengths + turned.shape[1]
            outputs.append(decode_attention(turned, *caches, lengths))
        return torch.cat(outputs, 1)

    torch.testing.assert_close(decode([slice(0, 6)]), decode([slice(n, n + 1) for n in range(6)]))


@pytest.mark.parametrize("case", [Case(), Case(tokens=7, page_size=16, splits=2)], ids=str)
def test_registration_and_compilation(case):
    tensors = make(case, torch.bfloat16)
    table = tensors[4] if case.page_size else None
    options = (True, 0.125, -1, 0.0, case.splits or 0)
    check_operator(OPERATORS["decode_attention"].overloads["default"], [(*tensors[:4], table, *options)])
    assert_compiles_once(runner(case), [tensors, tensors], backend="aot_eager")


def bad(**change):
    return dict(zip(("q", "k_cache", "v_cache", "cache_seqlens"), make(Case(), torch.float32), strict=True)) | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 1, 4, 64, dtype=torch.float64)}, "does not support"),
        ({"q": torch.zeros(3, 4, 64)}, r"must be \[B, N, Hq, D\]"),
        ({"v_cache": torch.zeros(3, 9, 2, 64)}, r"v_cache \[3, 9, 2, 64\] must be \[B, S, Hk, D\]"),
        ({"q": torch.zeros(3, 1, 4, 32)}, "must agree in batch and head width"),
        ({"q": torch.zeros(2, 1, 4, 64)}, "must agree in batch and head width"),
        ({"q": torch.zeros(3, 1, 3, 64)}, "3 heads, which is not a multiple of the 2 heads"),
        ({"q": torch.zeros(3, 129, 4, 64)}, r"129 tokens per sequence \(at most 128\)"),
        ({"k_cache": torch.zeros(3, 155, 2, 64).half()}, "k_cache is torch.float16"),
        ({"v_cache": torch.zeros(3, 155, 2, 128)[..., ::2]}, "must have adjacent channels"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int64)}, r"cache_seqlens \[3\] torch.int64 must be int32"),
        ({"cache_seqlens": torch.zeros(4, dtype=torch.int32)}, "cache_seqlens"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, "cache_seqlens is on meta"),
        ({"block_table": torch.zeros(3, 2)}, r"block_table \[3, 2\] torch.float32 must be int32 \[3, max_pages\]"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"splits": 0}, "splits must be from 1 to 64"),
        ({"splits": 65}, "splits must be from 1 to 64"),
        ({"q": torch.zeros(3, 1, 4, 64, requires_grad=True)}, "has no gradient"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "cuda"}, "cannot run on cpu"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**bad(**change))


@pytest.mark.parametrize("length", [156, -1])
def test_a_length_beyond_the_cache_is_named(length):
    arguments = bad(cache_seqlens=torch.tensor([1, length, 3], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=rf"cache_seqlens\[1\] = {length}, but there are 155 positions"):
        decode_attention(**arguments)
    with (
        debug_checks(),
        pytest.raises(ValueError, match=rf"cache_seqlens\[1\] = {length} is out of range \(0 to 155\)"),
    ):
        decode_attention(**arguments)


def test_a_page_that_does_not_exist_is_named_when_it_is_used():
    case = Case(page_size=8)
    *tensors, table = make(case, torch.float32)
    runner(case)(*tensors, table)  # entries beyond the lengths are -1
    pages = tensors[1].shape[0]
    table[2, 3] = pages
    with pytest.raises(RuntimeError, match=rf"block_table\[2, 3\] = {pages} is not one of {pages} pages"):
        runner(case)(*tensors, table)
    with debug_checks(), pytest.raises(ValueError, match=rf"block_table\[2, 3\] = {pages} is out of range"):
        runner(case)(*tensors, table)
    table[2, 3] = 0
    with debug_checks():
        runner(case)(*tensors, table)


def test_the_operator_itself_refuses_what_would_be_out_of_bounds():
    operator = OPERATORS["decode_attention"].overloads["default"]

    def call(**change):
        operator(*bad(**change).values(), None, True, 0.1, -1, 0.0, 0)

    with pytest.raises(RuntimeError, match="width of a head"):
        call(q=torch.zeros(3, 1, 4, 32))
    with pytest.raises(RuntimeError, match="must be a multiple"):
        call(q=torch.zeros(3, 1, 3, 64))
    with pytest.raises(RuntimeError, match="cache_seqlens must be int32"):
        call(cache_seqlens=torch.zeros(3))
    with pytest.raises(RuntimeError, match="differ in B"):
        call(q=torch.zeros(2, 1, 4, 64), cache_seqlens=torch.zeros(2, dtype=torch.int32))
