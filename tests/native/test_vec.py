"""The vector functions that all CPU kernels share (csrc/common/vec.h), at every instruction set of this processor."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamkernels.testing import supported_cpu_isas

HERE = Path(__file__).resolve().parent
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS = {
    "scalar": ["-DDK_VEC_LEVEL=0"],
    "avx2": ["-DDK_VEC_LEVEL=2", *AVX2],
    "avx512": ["-DDK_VEC_LEVEL=512", *AVX512],
    "avx512bf16": ["-DDK_VEC_LEVEL=513", *AVX512, "-mavx512bf16"],
}

if not shutil.which("g++"):
    pytest.skip("needs g++ to compile the probe", allow_module_level=True)


@pytest.fixture(scope="module", params=supported_cpu_isas())
def probe(request, tmp_path_factory):
    library = tmp_path_factory.mktemp("vec") / f"{request.param}.so"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-fno-math-errno", f"-DDK_ISA={request.param}"]
    command += [*FLAGS[request.param], f"-I{HERE.parents[1] / 'csrc'}", str(HERE / "vec_probe.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.maximum_of.restype = ctypes.c_float
    return loaded


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def mapped(function, values):
    values = np.ascontiguousarray(values, np.float32)
    result = np.empty_like(values)
    function(pointer(values), pointer(result), ctypes.c_int64(values.size))
    return result


def error_in_ulps(found, exact):
    """Distance in units in the last place of the exact value (of the smallest normal float below it)."""
    spacing = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return np.abs(found.astype(np.float64) - exact) / spacing.astype(np.float64)


def finite_floats(count, low, high, seed):
    """Random floats of every size between two bounds: uniform in their value, and uniform in their bit pattern."""
    rng = np.random.default_rng(seed)
    uniform = rng.uniform(low, high, count).astype(np.float32)
    bits = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits) & (bits >= low) & (bits <= high)]
    return np.concatenate([uniform, bits, np.float32([0.0, -0.0, low, high])])


def test_exp_is_within_one_unit_in_the_last_place(probe):
    values = finite_floats(400_000, -87.3, 88.7, 0)
    assert error_in_ulps(mapped(probe.exp_all, values), np.exp(values.astype(np.float64))).max() <= 1.0


def test_exp_beyond_its_range(probe):
    values = np.float32([-np.inf, -1e30, -200.0, -104.5, 89.0, 1e30, np.inf, np.nan, -100.0])
    found = mapped(probe.exp_all, values)
    assert found[:4].tolist() == [0.0] * 4
    assert np.isposinf(found[4:7]).all()
    assert np.isnan(found[7])
    assert abs(found[8] - np.exp(-100.0)) <= np.finfo(np.float32).smallest_subnormal


def test_sigmoid_and_tanh(probe):
    values = finite_floats(400_000, -60.0, 60.0, 1)
    exact = values.astype(np.float64)
    assert error_in_ulps(mapped(probe.sigmoid_all, values), 1 / (1 + np.exp(-exact))).max() <= 3.0
    assert error_in_ulps(mapped(probe.tanh_all, values), np.tanh(exact)).max() <= 3.0
    ends = np.float32([-np.inf, np.inf, np.nan, -500.0, 500.0])
    np.testing.assert_array_equal(mapped(probe.sigmoid_all, ends), np.float32([0, 1, np.nan, 0, 1]))
    np.testing.assert_array_equal(mapped(probe.tanh_all, ends), np.float32([-1, 1, np.nan, -1, 1]))


def test_sigmoid_for_an_element_type(probe):
    values = finite_floats(400_000, -80.0, 80.0, 6)
    exact = 1 / (1 + np.exp(-values.astype(np.float64)))
    units = 4 + 1.25 * np.abs(values)
    assert (error_in_ulps(mapped(probe.sigmoid_for_floats_all, values), exact) / units).max() <= 1
    assert (error_in_ulps(mapped(probe.sigmoid_for_halves_all, values), exact) / (units + 6.4e-5 / 2**-24)).max() <= 1
    ends = np.float32([-np.inf, np.inf, np.nan, -500.0, 500.0])
    for function in (probe.sigmoid_for_floats_all, probe.sigmoid_for_halves_all):
        np.testing.assert_array_equal(mapped(function, ends), np.float32([0, 1, np.nan, 0, 1]))


def test_standard_normal_keeps_relative_precision_in_both_tails(probe):
    values = finite_floats(400_000, -13.0, 13.0, 5)
    x = torch.from_numpy(values.astype(np.float64))
    exact_cdf = (torch.special.erfc(-x / 2**0.5) / 2).numpy()
    exact_density = (torch.exp(-x * x / 2) / (2 * np.pi) ** 0.5).numpy()
    # The exponent is rounded: half a unit of it makes x^2 / 2 units of the result. It has two roundings and a constant.
    units = 8 + 1.25 * values.astype(np.float64) ** 2
    assert (error_in_ulps(mapped(probe.normal_cdf_all, values), exact_cdf) / units).max() <= 1
    assert (error_in_ulps(mapped(probe.normal_density_all, values), exact_density) / units).max() <= 1
    # The fit for elements of 16 bits: the errors of its two polynomials come on top.
    units += 7e-6 / 2**-24
    assert (error_in_ulps(mapped(probe.coarse_normal_cdf_all, values), exact_cdf) / units).max() <= 1
    assert (error_in_ulps(mapped(probe.coarse_normal_density_all, values), exact_density) / units).max() <= 1


def test_standard_normal_at_its_ends(probe):
    ends = np.float32([-np.inf, np.inf, np.nan, -40.0, 40.0, -3e38])
    for cdf, density in (
        (probe.normal_cdf_all, probe.normal_density_all),
        (probe.coarse_normal_cdf_all, probe.coarse_normal_density_all),
    ):
        np.testing.assert_array_equal(mapped(cdf, ends), np.float32([0, 1, np.nan, 0, 1, 0]))
        np.testing.assert_array_equal(mapped(density, ends), np.float32([0, 0, np.nan, 0, 0, 0]))


def test_maximum_minimum_and_selection(probe):
    width = probe.width()
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, width)).astype(np.float32)
    assert probe.maximum_of(pointer(a)) == a.max()
    a[1], b[2] = np.nan, np.nan
    larger, smaller, where_less = np.empty((3, width), np.float32)
    probe.larger_and_smaller(*map(pointer, (a, b, larger, smaller, where_less)))
    either = np.isnan(a) | np.isnan(b)
    np.testing.assert_array_equal(larger, np.where(either, b, np.fmax(a, b)))
    np.testing.assert_array_equal(smaller, np.where(either, b, np.fmin(a, b)))
    np.testing.assert_array_equal(where_less, np.where(a < b, np.arange(width), -1))


def test_products_of_bfloat16_pairs(probe):
    width = probe.width()
    torch.manual_seed(3)
    first, second, c = torch.randn(3, width)
    b = torch.randn(2 * width).bfloat16()
    found, stored = torch.empty(width), b.view(torch.int16).numpy()
    arrays = [first.numpy(), second.numpy(), stored, c.numpy(), found.numpy()]
    probe.dot_of(*map(pointer, arrays))
    x, y, z, w = (t.double() for t in (first.bfloat16(), second.bfloat16(), b[0::2], b[1::2]))
    exact = c.double() + x * z + y * w
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-7 * float(exact.abs().max() + 4))


def test_one_pair_against_many(probe):
    width = probe.width()
    torch.manual_seed(4)
    a, pair = torch.randn(2 * width).bfloat16(), torch.randn(2).bfloat16()
    found = torch.empty(width)
    probe.dot_with_one_pair(*(pointer(t.view(torch.int16).numpy()) for t in (a, pair)), pointer(found.numpy()))
    exact = (a.double().view(-1, 2) * pair.double()).sum(-1)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max() + 1))
