"""The CUDA C++ kernel of cross_conditioning, run by the emulator: right on every schedule, in bounds, without races."""

import ctypes
import functools

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
from tests.support.cross_conditioning import inputs, reference
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

pytestmark = needs_compiler

# pictures, conditions, positions, heads, keys, width: several tiles, pictures that share a condition, partial sizes.
CASES = (
    (2, 1, 130, 2, 64, 64),
    (1, 1, 1, 1, 1, 8),
    (2, 2, 70, 1, 77, 40),
    (1, 1, 65, 1, 128, 64),
    (1, 1, 40, 2, 13, 56),
)


class Source(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("outer", "row", "head"))]


class Job(ctypes.Structure):
    """csrc/cross_conditioning/kernel.cuh"""

    _fields_ = [
        *((name, Source) for name in ("q", "k", "v")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pictures", "pictures_per_condition", "positions", "heads", "keys")),
        *((name, ctypes.c_int64) for name in ("width", "tiles_per_block")),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def library():
    return EmulatedLibrary("cross_conditioning.cpp")


def run(q, k, v, tiles_per_block=2, seed=0):
    out = guarded(torch.full(q.shape, torch.nan, dtype=q.dtype))
    sources = [Source(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v)]
    pictures, positions, heads, width = q.shape
    shape = (pictures, pictures // k.shape[0], positions, heads, k.shape[1], width, tiles_per_block)
    job = Job(*sources, out.data_ptr(), *shape, width**-0.5)
    library()("cross_conditioning", job, int(q.dtype == torch.float16), seed=seed)
    return out


def plain(case, dtype):
    return [guarded(t.detach()) for t in inputs(case, dtype)]


def test_the_job_has_the_layout_of_the_header():
    size = library()._library.sizeof_job
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(Job)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_eager_and_stays_in_bounds(case, dtype):
    assert_close_to_float64(run, reference, lambda: plain(case, dtype), 8 if case[2] == 1 else 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_schedule_gives_the_same_bits(seed):
    q, k, v = plain((1, 1, 150, 1, 64, 64), torch.bfloat16)
    assert torch.equal(run(q, k, v, seed=seed), run(q, k, v))


def test_the_number_of_tiles_in_a_block_does_not_matter():
    q, k, v = plain((1, 1, 200, 1, 20, 64), torch.bfloat16)
    expected = run(q, k, v, 1)
    for tiles in (2, 3, 7):
        assert torch.equal(run(q, k, v, tiles), expected)


def test_reads_of_matrices_meet_no_bank_twice():
    """Four wavefronts for four matrices, the least there is."""
    q, k, v = plain((1, 1, 64, 1, 64, 64), torch.bfloat16)
    out = guarded(torch.empty_like(q))
    job = Job(
        *(Source(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v)), out.data_ptr(), 1, 1, 64, 1, 64, 64, 1, 0.125
    )
    counters = library()("cross_conditioning", job, 0)
    assert counters.ldmatrix_wavefronts == 4 * counters.ldmatrix
    assert counters.mma == 4 * 2 * (64 // 8) * (64 // 16)


def test_strided_sources():
    wide = torch.randn(1, 70, 2 * 64 + 40).to(torch.bfloat16)
    q = wide[..., 8 : 8 + 128].unflatten(-1, (2, 64))
    k, v = plain((1, 1, 70, 2, 33, 64), torch.bfloat16)[1:]
    assert torch.equal(run(q, k, v), run(q.contiguous(), k, v))


@needs_race_checker
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_no_races(seed):
    assert RaceChecked("cross_conditioning.cpp")(seed) == []
