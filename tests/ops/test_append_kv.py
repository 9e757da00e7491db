"""append_kv on the devices of this machine: CPU at every instruction set; Triton and CUDA C++ where there is a GPU."""

import pytest
import torch

from dreamkernels import append_kv, rms_norm
from dreamkernels.ops.debug import debug_checks
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.append_kv import CASES, Case, make, reference, runner, split, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

GPU = [
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, case):
    with using_cpu_isa(isa):
        assert_close_to_float64(runner(case), reference(case), lambda: make(case, dtype), trials(case))


@pytest.mark.parametrize("implementation", GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_is_as_exact_as_eager(implementation, dtype, case):
    chosen = runner(case, implementation)
    assert_close_to_float64(chosen, reference(case), lambda: make(case, dtype, "cuda"), trials(case))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_only_the_new_positions_are_written(case):
    tensors = make(case, torch.bfloat16)
    _, k_cache, v_cache = runner(case)(*tensors)
    written = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    for b, length in enumerate(case.lengths):
        for position in range(length, length + case.tokens):
            page = tensors[-1][b, position // case.page_size] if case.page_size else b
            written[page, position % case.page_size if case.page_size else position] = True
    for after, before in ((k_cache, tensors[3]), (v_cache, tensors[4])):
        changed = (after != before).any(-1).any(-1)
        assert torch.equal(changed, written)


def test_the_position_is_the_number_of_cached_tokens():
    """Feeding tokens one by one, in two parts, or at once gives the same cache and queries."""
    case = Case(lengths=(4, 9), tokens=6, norm=True, page_size=5)
    tensors = make(case, torch.float32)
    expected = runner(case)(*tensors)
    (q, k, v, k_cache, v_cache, lengths, *rest), options = split(case, tensors)
    queries = []
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):
        new = (x[:, part] for x in (q, k, v))
        queries.append(append_kv(*new, k_cache, v_cache, lengths + part.start, *rest, **options))
    for found, wanted in zip((torch.cat(queries, 1), k_cache, v_cache), expected, strict=True):
        assert torch.equal(found, wanted)


def test_normalisation_is_that_of_rms_norm():
    case = Case(norm=True, width=128, rotated=128)
    tensors = make(case, torch.bfloat16)
    (q, k, v, *_), options = split(case, tensors)
    plain = Case(width=128, rotated=128)
    normalised = [rms_norm(q, options["q_norm_weight"]), rms_norm(k, options["k_norm_weight"]), v]
    expected = runner(plain)(*normalised, *tensors[3:8])
    for found, wanted in zip(runner(case)(*tensors), expected, strict=True):
        assert torch.equal(found, wanted)


def test_one_norm_weight_without_the_other():
    case = Case(norm=True)
    *tensors, q_weight, k_weight = make(case, torch.float32)
    both = runner(case)(*tensors, q_weight, k_weight)
    none = runner(Case())(*tensors)
    caches = [tensors[3].clone(), tensors[4].clone()]
    q = append_kv(*tensors[:3], *caches, *tensors[5:], k_norm_weight=k_weight)
    assert torch.equal(q, none[0])
    assert torch.equal(caches[0], both[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_slices_of_a_joint_projection_and_strided_caches(dtype):
    case = Case(tokens=3, norm=True)
    tensors = make(case, dtype)
    q, k, v = tensors[:3]
    joint = torch.cat((q, k, v), 2)
    slices = list(joint.split([q.shape[2], k.shape[2], v.shape[2]], 2))
    heads_first = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in tensors[3:5]]
    assert not slices[1].is_contiguous()
    assert not heads_first[0].is_contiguous()
    expected = runner(case)(*tensors)
    arguments, options = split(case, [*slices, *heads_first, *tensors[5:]])
    found = append_kv(*arguments, **options), *heads_first
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert found[0].is_contiguous()
    channels = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    assert channels[0].stride(-1) == 2
    for a, b in zip(runner(case)(*channels, *tensors[3:]), expected, strict=True):
        assert torch.equal(a, b)


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    case = Case(lengths=(40, 3, 99, 0), tokens=30, norm=True, q_heads=8)
    tensors = make(case, torch.bfloat16)
    assert_repeats_bitwise(lambda: runner(case)(*tensors))


@pytest.mark.parametrize("case", [Case(), Case(norm=True, page_size=4)], ids=str)
def test_registration_and_compilation(case):
    tensors = make(case, torch.bfloat16)
    arguments, options = split(case, tensors)
    weights = [options.get("q_norm_weight"), options.get("k_norm_weight"), 1e-6, options.get("block_table")]
    check_operator(OPERATORS["append_kv"].overloads["default"], [(*arguments, *weights)])
    assert_compiles_once(runner(case), [tensors, tensors])


def test_a_compiled_call_writes_into_the_given_cache():
    case = Case()
    expected = runner(case)(*(tensors := make(case, torch.float32)))
    compiled = torch.compile(append_kv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), expected[0])
    assert torch.equal(tensors[3], expected[1])
    assert torch.equal(tensors[4], expected[2])


def bad(**change):
    names = ["q", "k", "v", "k_cache", "v_cache", "cache_seqlens", "cos", "sin"]
    return dict(zip(names, make(Case(), torch.float32), strict=True)) | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 1, 4, 64, dtype=torch.float64)}, "does not support"),
        ({"q": torch.zeros(3, 4, 64)}, r"must be \[B, N, Hq, D\]"),
        ({"k": torch.zeros(3, 2, 2, 64)}, r"must be \[B, N, Hq, D\]"),
        ({"v": torch.zeros(3, 1, 1, 64)}, r"v \[3, 1, 1, 64\] must be"),
        ({"v": torch.zeros(3, 1, 2, 64).half()}, "v is torch.float16"),
        ({"k_cache": torch.zeros(2, 21, 2, 64)}, r"k_cache \[2, 21, 2, 64\] must be \[3, S, 2, 64\]"),
        ({"v_cache": torch.zeros(3, 20, 2, 64)}, "both caches of one shape"),
        ({"k_cache": torch.zeros(3, 21, 2, 64).half()}, "k_cache is torch.float16"),
        ({"k_cache": torch.zeros(3, 21, 2, 128)[..., ::2]}, "k_cache with strides .* cannot be written"),
        ({"v_cache": torch.zeros(3, 21, 1, 64).expand(3, 21, 2, 64)}, "v_cache with strides .* cannot be written"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int64)}, r"cache_seqlens \[3\] torch.int64 must be int32 \[3\]"),
        ({"cache_seqlens": torch.zeros(2, dtype=torch.int32)}, "cache_seqlens"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, "cache_seqlens is on meta"),
        ({"cos": torch.zeros(21, 32)}, r"must be \[positions, R\] both"),
        ({"cos": torch.zeros(21, 64).half(), "sin": torch.zeros(21, 64).half()}, "cos and sin have dtype"),
        ({"cos": torch.zeros(21, 66), "sin": torch.zeros(21, 66)}, "have 66 columns"),
        ({"cos": torch.zeros(21, 7), "sin": torch.zeros(21, 7)}, "have 7 columns"),
        ({"sin": torch.zeros(21, 64, device="meta")}, "sin on meta"),
        ({"q_norm_weight": torch.ones(63)}, r"q_norm_weight \[63\] must be \[64\]"),
        ({"k_norm_weight": torch.ones(64).half()}, "k_norm_weight is torch.float16"),
        ({"block_table": torch.zeros(3, 2)}, r"block_table \[3, 2\] torch.float32 must be int32 \[3, max_pages\]"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, "block_table"),
        ({"q": torch.zeros(3, 1, 4, 64, requires_grad=True)}, "has no gradient"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "cuda"}, "cannot run on cpu"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        append_kv(**bad(**change))


@pytest.mark.parametrize("position", [21, -1, 2**31 - 1])
def test_a_position_beyond_the_cache_is_named_and_nothing_is_written(position):
    arguments = bad(cache_seqlens=torch.tensor([0, position, 3], dtype=torch.int32))
    before = arguments["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"sequence 1 writes positions {position} to {position}, but there are 21"):
        append_kv(**arguments)
    assert torch.equal(arguments["k_cache"], before)
    with (
        debug_checks(),
        pytest.raises(ValueError, match=rf"cache_seqlens\[1\] = {position} is out of range \(0 to 20\)"),
    ):
        append_kv(**arguments)


def test_a_position_beyond_the_tables_is_named():
    arguments = bad(cos=torch.zeros(10, 64), sin=torch.zeros(10, 64))
    with pytest.raises(RuntimeError, match=r"sequence 2 writes positions 17 to 17, .* 10 in cos and sin"):
        append_kv(**arguments)
    with debug_checks(), pytest.raises(ValueError, match=r"cache_seqlens\[2\] = 17 is out of range \(0 to 9\)"):
        append_kv(**arguments)


def test_a_page_that_does_not_exist_is_named_when_it_is_used():
    case = Case(page_size=4)
    *tensors, table = make(case, torch.float32)
    pages = tensors[3].shape[0]
    table[1, 1:] = -1  # not reached: sequence 1 writes position 0
    runner(case)(*tensors, table)
    table[2, 4] = pages
    with pytest.raises(RuntimeError, match=rf"block_table\[2, 4\] = {pages} is not one of {pages} pages"):
        runner(case)(*tensors, table)
    with debug_checks(), pytest.raises(ValueError, match=rf"block_table\[2, 4\] = {pages} is out of range"):
        runner(case)(*tensors, table)
    with debug_checks():
        table[2, 4] = 0
        runner(case)(*tensors, table)


def test_the_operator_itself_refuses_what_would_be_out_of_bounds():
    operator = OPERATORS["append_kv"].overloads["default"]

    def call(**change):
        operator(*bad(**change).values(), None, None, 1e-6, None)

    with pytest.raises(RuntimeError, match="a cache does not fit k"):
        call(k_cache=torch.zeros(3, 21, 1, 64))
    with pytest.raises(RuntimeError, match="differ in B"):
        call(k_cache=torch.zeros(2, 21, 2, 64), v_cache=torch.zeros(2, 21, 2, 64))
    with pytest.raises(RuntimeError, match="cache_seqlens must be int32"):
        call(cache_seqlens=torch.zeros(3))
    with pytest.raises(RuntimeError, match="R must be even"):
        call(cos=torch.zeros(21, 66), sin=torch.zeros(21, 66))
