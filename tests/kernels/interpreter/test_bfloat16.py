"""The interpreter's bfloat16, patched, against torch."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dreamkernels.testing import interpreter


@triton.jit
def _elementwise(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, x * y)
    tl.store(out + 2 * N + i, x - y)
    tl.store(out + 3 * N + i, tl.maximum(x, y))
    tl.store(out + 4 * N + i, tl.where(x > y, x, y))


@triton.jit
def _casts(a, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(a + i)
    tl.store(out + i, x.to(tl.bfloat16))
    tl.store(out + N + i, x.to(tl.bfloat16).to(tl.float16).to(tl.bfloat16))
    tl.store(out + 2 * N + i, x.to(tl.int32).to(tl.bfloat16))


@triton.jit
def _reductions(a, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(a + i[:, None] * COLUMNS + j[None, :])
    tl.store(out + i, tl.sum(x, axis=1))
    tl.store(out + ROWS + i, tl.max(x, axis=1))


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_elementwise_arithmetic_rounds_once():
    a, b = torch.randn(2, 256).bfloat16()
    out = torch.empty(5, 256, dtype=torch.bfloat16)
    _elementwise[(1,)](a, b, out, N=256)
    expected = [a + b, a * b, a - b, torch.maximum(a, b), torch.maximum(a, b)]
    for found, wanted in zip(out, expected, strict=True):
        assert torch.equal(found, wanted)


def test_casts_round_to_nearest_even():
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.0e38, 1e-40, 0.0, 65280.0, -7.9])
    x = torch.cat([ties, torch.randn(248) * 100])
    out = torch.empty(3, 256, dtype=torch.bfloat16)
    _casts[(1,)](x, out, N=256)
    assert torch.equal(out[0], x.bfloat16())
    assert torch.equal(out[1], x.bfloat16().half().bfloat16())
    small = x.abs() < 1e9
    assert torch.equal(out[2][small], x[small].int().bfloat16())


def test_narrow_keeps_nan_and_infinity():
    values = np.array([np.nan, np.inf, -np.inf, -0.0], dtype=np.float32)
    round_trip = interpreter.widen(interpreter.narrow(values))
    assert np.isnan(round_trip[0])
    assert round_trip[1:].tolist() == [np.inf, -np.inf, 0.0]
    assert np.signbit(round_trip[3])


def test_reductions():
    x = torch.randn(8, 64).bfloat16()
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    _reductions[(1,)](x, out, ROWS=8, COLUMNS=64)
    torch.testing.assert_close(out[0], x.float().sum(1).bfloat16(), rtol=1e-2, atol=0)
    assert torch.equal(out[1], x.max(1).values)


def test_dot_accumulates_in_float32():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    _product[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_an_untested_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "9.9.0")
    with pytest.raises(RuntimeError, match=r"3\.6 to 3\.9, not 9\.9\.0"):
        interpreter.install()
