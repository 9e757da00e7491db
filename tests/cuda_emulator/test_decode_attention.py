"""The CUDA C++ kernels of decode_attention, run by the emulator: right on every schedule, in bounds, without races."""

import ctypes
import functools
import mmap

import pytest
import torch

from tests.cuda_emulator.emulation import (
    SEEDS,
    EmulatedLibrary,
    RaceChecked,
    guarded,
    needs_compiler,
    needs_race_checker,
)
from tests.cuda_emulator.test_append_kv import MAP_NORESERVE, Paging, Strides
from tests.support.decode_attention import CASES, Case, make, reference
from tests.support.operators import assert_close_to_float64, dtype_name

pytestmark = needs_compiler


class Job(ctypes.Structure):
    """csrc/decode_attention/job.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "cache_seqlens")),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "partial_out", "partial_lse")),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("v_strides", Strides),
        ("paging", Paging),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("tokens", "q_heads", "kv_heads", "width", "window", "splits")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_bool),
    ]


@functools.cache
def library():
    return EmulatedLibrary("decode_attention.cpp")


def call(case, q, k_cache, v_cache, lengths, block_table=None, seed=0):
    out, lse = (
        torch.full(q.shape, torch.nan, dtype=q.dtype),
        torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan),
    )
    if not q.numel():
        return out, lse, None
    splits = case.splits or 1
    partial_out, partial_lse = torch.full((splits, *q.shape), torch.nan), torch.full((splits, *lse.shape), torch.nan)
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": lengths, "out": out, "lse": lse}
    named |= {"partial_out": partial_out, "partial_lse": partial_lse}
    named = {name: tensor if "cache" in name or name == "q" else guarded(tensor) for name, tensor in named.items()}
    job = Job(**{name: tensor.data_ptr() for name, tensor in named.items()})
    for name, tensor in (("q", q), ("k", k_cache), ("v", v_cache)):
        setattr(job, f"{name}_strides", Strides(*tensor.stride()[:3]))
    table = None if block_table is None else block_table.data_ptr()
    per_sequence = 1 if block_table is None else block_table.shape[1]
    job.paging = Paging(table, k_cache.shape[1], k_cache.shape[0], per_sequence)
    job.sequences, job.tokens, job.q_heads, job.width = q.shape
    job.kv_heads, job.splits, job.causal, job.window = k_cache.shape[2], splits, case.causal, case.window or -1
    job.scale = q.shape[3] ** -0.5 if case.scale is None else case.scale
    job.softcap = case.softcap or 0.0
    counters = library()("decode_attention", job, int(q.dtype == torch.float16), seed=seed)
    return named["out"], named["lse"], counters


def runner(case, seed):
    def run(*tensors):
        return call(case, *map(guarded, tensors), seed=seed)[:2]

    return run


def test_the_job_has_the_layout_of_the_header():
    assert library()._library.sizeof_job() == ctypes.sizeof(Job)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_eager(case, seed):
    """And in bounds: every tensor ends at memory that may not be touched."""
    torch.manual_seed(seed)
    dtype = (torch.bfloat16, torch.float16)[seed % 2]
    assert_close_to_float64(runner(case, seed), reference(case), lambda: make(case, dtype), 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(5):
        kv_heads, tokens = draw(1, 2), draw(1, 20)
        case = Case(
            lengths=tuple(draw(0, 200) for _ in range(draw(1, 3))),
            tokens=tokens,
            q_heads=kv_heads * draw(1, 4),
            kv_heads=kv_heads,
            width=8 * draw(1, 16),
            page_size=draw(0, 1) * draw(1, 70),
            causal=bool(draw(0, 1)),
            window=draw(1, 90) if draw(0, 1) else None,
            splits=draw(1, 4),
        )
        assert_close_to_float64(runner(case, seed), reference(case), lambda case=case: make(case, torch.bfloat16))


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 40])
def test_matrix_loads_have_no_bank_conflicts(width, tokens):
    case = Case(tokens=tokens, lengths=(100,), q_heads=2, width=width)
    counters = call(case, *make(case, torch.bfloat16))[2]
    assert counters.ldmatrix > 0
    assert counters.ldmatrix_wavefronts == 4 * counters.ldmatrix


def test_pages_that_do_not_exist_read_as_zeros_and_lengths_end_with_the_cache():
    """Documented behaviour on CUDA, where checking would stop the host."""
    case = Case(lengths=(20,), page_size=8)
    q, k_cache, v_cache, lengths, table = make(case, torch.bfloat16)
    table[0, 1] = 77
    expected_k, expected_v = (
        torch.cat((cache, torch.zeros(1, *cache.shape[1:]).to(cache))) for cache in (k_cache, v_cache)
    )
    expected_table = table.clone()
    expected_table[0, 1] = expected_k.shape[0] - 1
    expected = reference(case)(q, expected_k, expected_v, lengths, expected_table)
    found = call(case, q, k_cache, v_cache, lengths, table)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=1e-2)
    case = Case(lengths=(25,))
    q, k_cache, v_cache, lengths = make(case, torch.bfloat16)
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
    expected = call(case, q, k_cache, v_cache, torch.tensor([30], dtype=torch.int32))
    found = call(case, q, k_cache, v_cache, torch.tensor([1000], dtype=torch.int32))
    assert torch.equal(found[0], expected[0])


def test_offsets_beyond_2_to_the_31_elements():
    """Caches whose sequences lie 2^31 elements apart, in address space that is reserved and never filled."""
    case = Case(lengths=(12, 70), splits=2)
    tensors = make(case, torch.bfloat16)
    expected = call(case, *tensors)
    apart = 2**31 + 64
    for position in (1, 2):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        whole = torch.frombuffer(mmap.mmap(-1, 2 * (apart + 65536), flags=flags), dtype=torch.bfloat16)
        small = tensors[position]
        tensors[position] = whole.as_strided(small.shape, (apart, *small.stride()[1:])).copy_(small)
    found = call(case, *tensors)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_schedules_give_the_same_bits(dtype):
    case = Case(tokens=9, lengths=(200, 33), splits=3, width=80, page_size=16)
    tensors = make(case, dtype)
    results = [call(case, *tensors, seed=seed)[:2] for seed in SEEDS]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@needs_race_checker
@pytest.mark.parametrize("tokens", [1, 12])
def test_without_races(tokens):
    program = RaceChecked("decode_attention.cpp")
    assert [program(seed, tokens) for seed in SEEDS] == [[]] * len(SEEDS)
