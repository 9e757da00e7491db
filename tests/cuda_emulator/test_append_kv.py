"""The CUDA C++ kernel of append_kv, run by the emulator: right on every schedule, in bounds, and without races."""

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
from tests.support.append_kv import CASES, Case, make, reference, split, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

pytestmark = needs_compiler

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13; Linux's value


class Strides(ctypes.Structure):
    """TokenStrides and CacheStrides."""

    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "middle", "head")]


class Paging(ctypes.Structure):
    _fields_ = [
        ("block_table", ctypes.c_void_p),
        ("page_size", ctypes.c_int64),
        ("pages", ctypes.c_int64),
        ("pages_per_sequence", ctypes.c_int64),
    ]


class Job(ctypes.Structure):
    """csrc/append_kv/job.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_cache", "v_cache", "rotated_q", "cache_seqlens")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "q_norm_weight", "k_norm_weight")),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v", "k_cache", "v_cache")),
        ("paging", Paging),
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "positions")),
        *((name, ctypes.c_int32) for name in ("q_heads", "kv_heads", "width", "rotated")),
        ("eps", ctypes.c_float),
    ]


@functools.cache
def library():
    return EmulatedLibrary("append_kv.cpp")


def call(
    q, k, v, k_cache, v_cache, lengths, cos, sin, q_norm_weight=None, k_norm_weight=None, block_table=None, seed=0
):
    """append_kv by the emulated kernel; the caches are written in place."""
    out = guarded(torch.full(q.shape, torch.nan, dtype=q.dtype))
    named = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "rotated_q": out, "cache_seqlens": lengths}
    named |= {"cos": cos, "sin": sin, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    job = Job(**{name: tensor.data_ptr() for name, tensor in named.items() if tensor is not None})
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        setattr(job, f"{name}_strides", Strides(*named[name].stride()[:3]))
    table = None if block_table is None else block_table.data_ptr()
    per_sequence = 1 if block_table is None else block_table.shape[1]
    job.paging = Paging(table, k_cache.shape[1], k_cache.shape[0], per_sequence)
    job.sequences, job.tokens, job.q_heads, job.width = q.shape
    job.kv_heads, (job.positions, job.rotated), job.eps = k.shape[2], cos.shape, 1e-6
    float_tables = int(cos.dtype == torch.float32)
    if q.numel() and k.numel():
        library()("append_kv", job, q.element_size(), int(q.dtype == torch.float16), float_tables, seed=seed)
    return out


def runner(case, seed):
    def run(*tensors):
        arguments, options = split(case, tensors)
        arguments = [guarded(tensor) for tensor in arguments]
        q = call(*arguments, **{name: guarded(tensor) for name, tensor in options.items()}, seed=seed)
        return q, arguments[3], arguments[4]

    return run


def test_the_job_has_the_layout_of_the_header():
    assert library()._library.sizeof_job() == ctypes.sizeof(Job)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_eager(case, dtype, seed):
    """And in bounds: each tensor ends at memory that may not be touched."""
    torch.manual_seed(seed)
    repeats = min(8, trials(case))
    assert_close_to_float64(runner(case, seed), reference(case), lambda: make(case, dtype), repeats)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(8):
        width = draw(1, 20) * draw(1, 8) + 1
        case = Case(
            lengths=tuple(draw(0, 30) for _ in range(draw(1, 4))),
            tokens=draw(1, 5),
            q_heads=draw(1, 20),
            kv_heads=draw(1, 9),
            width=width,
            rotated=2 * draw(1, width // 2),
            norm=bool(draw(0, 1)),
            page_size=draw(0, 1) * draw(1, 9),
            float_tables=bool(draw(0, 1)),
        )
        assert_close_to_float64(runner(case, seed), reference(case), lambda case=case: make(case, torch.bfloat16), 2)


@pytest.mark.parametrize("case", [Case(), Case(page_size=4)], ids=str)
def test_what_is_out_of_range_is_not_written(case):
    tensors = make(case, torch.float32)
    tensors[5] = torch.tensor([5, -3, 1000], dtype=torch.int32)
    _, k_cache, v_cache = runner(case, 0)(*tensors)
    for after, before in ((k_cache, tensors[3]), (v_cache, tensors[4])):
        assert (after != before).any(-1).any(-1).sum() == 1
    if case.page_size:
        tensors[-1][0, 1] = 999
        assert torch.equal(runner(case, 0)(*tensors)[1], tensors[3])


def test_offsets_beyond_2_to_the_31_elements():
    """A cache whose pages lie 2^31 elements apart, in address space that is reserved and never filled."""
    case = Case(lengths=(2, 3), width=64)
    tensors = make(case, torch.bfloat16)
    expected = reference(case)(*tensors)
    apart = 2**31 + 64
    regions = []
    for position in (3, 4):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        regions.append(mmap.mmap(-1, 2 * (apart + 4096), flags=flags))
        whole = torch.frombuffer(regions[-1], dtype=torch.bfloat16)
        small = tensors[position]
        tensors[position] = whole.as_strided(small.shape, (apart, *small.stride()[1:])).copy_(small)
    q = call(*tensors)
    for found, wanted in zip((q, *tensors[3:5]), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@needs_race_checker
def test_without_races():
    program = RaceChecked("append_kv.cpp")
    assert [program(seed) for seed in SEEDS] == [[]] * len(SEEDS)
