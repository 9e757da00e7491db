"""Right bfloat16 arithmetic in Triton's interpreter.

The interpreter keeps bfloat16 as uint16 and computes on the bits: sums and products of bfloat16 are silently wrong,
and float32 is truncated instead of rounded (triton-lang/triton #4972 and #11584; declined upstream). `install` makes
every operation on bfloat16 compute in float32 and round to nearest even, as the compiled kernels do. Not covered:
atomics on bfloat16, which the interpreter refuses itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

TESTED_VERSIONS = ((3, 6), (3, 9))
_PATCHED = "_dreamkernels_bfloat16"


def widen(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bits -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float32 -> bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(values: npt.ArrayLike) -> TensorHandle:
    return TensorHandle(narrow(values), tl.bfloat16)


def _binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not (_is_bfloat16(lhs) and _is_bfloat16(rhs)):
            return original(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _narrowed(result)

    return binary_op


def _unary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        return _narrowed(op(widen(arg.data))) if _is_bfloat16(arg) else original(self, arg, op)

    return unary_op


def _create_fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bfloat16(z):
            return original(self, x, y, z)
        return _narrowed(original(self, _widened(x), _widened(y), _widened(z)).data)

    return create_fma


def _create_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _widened(a), _widened(b), *rest)

    return create_dot


def _cast_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == target.scalar:
            return original(self, source, target)
        if _is_bfloat16(source):
            wide = _widened(source)
            return wide if target.scalar == tl.float32 else original(self, wide, target)
        if target.scalar == tl.bfloat16:
            return _narrowed(np.asarray(source.data).astype(np.float32))
        return original(self, source, target)

    return cast_impl


def _apply_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions and scans: run in float32, round each floating result that came from a bfloat16 input."""

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        if not any(value.dtype == tl.bfloat16 for value in inputs):
            return original(self, inputs)
        from_bfloat16 = [value.dtype == tl.bfloat16 for value in inputs]
        wide = tuple(
            self.to_tensor(widen(value.handle.data), tl.float32) if narrow_input else value
            for value, narrow_input in zip(inputs, from_bfloat16, strict=True)
        )
        results = original(self, wide)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(
            _rounded_tensor(result) if result.dtype == tl.float32 and narrow_input else result
            for result, narrow_input in zip(results, from_bfloat16, strict=False)
        )

    return apply_impl


def _rounded_tensor(value: Any) -> Any:
    shape = list(value.shape)
    kind = tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16
    return tl.core.tensor(_narrowed(value.handle.data), kind)


def install() -> None:
    """Patches the interpreter of this process, once. Raises RuntimeError for a Triton that this was not tested with."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TESTED_VERSIONS[0] <= version <= TESTED_VERSIONS[1]:
        raise RuntimeError(
            f"the interpreter's bfloat16 patch is tested with triton 3.6 to 3.9, not {triton.__version__}; "
            "run tests/kernels/interpreter/test_bfloat16.py and extend TESTED_VERSIONS when it passes"
        )
    if getattr(InterpreterBuilder, _PATCHED, False):
        return
    for owner, method, wrap in (
        (InterpreterBuilder, "binary_op", _binary_op),
        (InterpreterBuilder, "unary_op", _unary_op),
        (InterpreterBuilder, "create_fma", _create_fma),
        (InterpreterBuilder, "create_dot", _create_dot),
        (InterpreterBuilder, "cast_impl", _cast_impl),
        (ReduceOps, "apply_impl", _apply_impl),
        (ScanOps, "apply_impl", _apply_impl),
    ):
        setattr(owner, method, wrap(getattr(owner, method)))
    setattr(InterpreterBuilder, _PATCHED, True)
