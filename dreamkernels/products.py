"""Products with the weights of linear layers, trained ones too, on processors where torch's library is not the fastest.

torch hands float32 products to MKL, which has AVX-512 for Intel's processors only: others get its kernels for AVX2.
oneDNN, which torch brings as well, uses AVX-512 on all of them. Beside MKL it is 2.2 times as fast with a decoder's
matrices on an AMD EPYC (Zen 5; 215 GFLOP/s per core instead of 96), in all three products: the result's, that of the
input's gradient and that of the weight's. It prepares itself for every new shape, which takes 0.6 ms once.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["LEAST_FLOPS", "linear", "linear_layer", "onednn_is_faster"]

LEAST_FLOPS = 2**22
"""Smaller products run as in torch: oneDNN takes 10 us more per call, which pays from half as many operations on."""

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_PRODUCT = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor is one that MKL does not serve with AVX-512 while oneDNN does.

    Decided by what the processor is, never by a measurement: a resumed run must add up in the same order.
    """
    ours = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _PRODUCT is not None
    return ours and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() not in ("", "GenuineIntel")


def _maker() -> str:
    """The processor's own name of its maker; "" where the system does not tell it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor().rpartition(" ")[2]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias like torch.nn.functional.linear, in oneDNN where that is faster.

    x [..., in], weight [out, in], bias [out] -> [..., out]. It is torch's own function on other processors and devices,
    in other dtypes than float32, under autocast, torch.compile and function transforms, for tensor subclasses, and for
    products below `LEAST_FLOPS`. Gradients are those of torch's, and so are second derivatives.
    """
    if not _runs_in_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = _Linear.apply(rows, weight, bias)
    else:
        y = _product(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_layer(module: Any, x: Tensor) -> Tensor:
    """module(x), by `linear` where the module is an `nn.Linear` that nobody has wrapped or watches."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or _watched(module):
        return module(x)
    return linear(x, module.weight, module.bias)


def _watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _runs_in_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype == torch.float32 == weight.dtype
        and 2 * x.numel() * weight.shape[0] >= LEAST_FLOPS
        and x.device.type == "cpu" == weight.device.type
        and onednn_is_faster()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of matrices with any strides."""
    return _PRODUCT(x, weight, bias, "none", [], "")  # type: ignore[misc]


class _Linear(torch.autograd.Function):
    """The three products of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        product = F.linear if torch.is_grad_enabled() else _product  # second derivatives go through torch's own
        grad_x = product(grad_y, weight.t()) if of_x else None
        grad_weight = product(grad_y.t(), x.t()) if of_weight else None
        return grad_x, grad_weight, grad_y.sum(0) if of_bias else None


if _PRODUCT is not None:

    @register_flop_formula(_PRODUCT)
    def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
        """For torch's FlopCounterMode and for `dreamllm profile`, which otherwise would count nothing."""
        return 2 * weight_shape[0] * functools.reduce(lambda a, b: a * b, x_shape, 1)
