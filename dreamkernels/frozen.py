"""Linear layers and convolutions whose weights do not change, for CPU: oneDNN's own weight layout, made once.

PyTorch brings a weight into oneDNN's blocked layout in every call and adds the bias of a float32 linear layer in a pass
of its own. With small batches of pictures the reordering costs as much as the convolution. Here the reordered weight
stays, a residual is added while the result is written, and the gradient of the input is again such a product, with the
transposed weight. Nothing but the input gets a gradient. Under autocast the weights are cast once. Elsewhere,
and in other dtypes, torch's own product runs.

    conv = FrozenConv2d(module)
    y = conv(x)                 # module(x)
    y = conv(x, residual)       # module(x) + residual
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "FrozenConv2d",
    "FrozenLinear",
    "FrozenProduct",
    "FrozenUpsample",
    "version_of",
    "why_not_frozen",
    "why_not_packed",
]

_MKLDNN = torch.ops.mkldnn
_OPERATORS = (
    "_linear_pointwise",
    "_convolution_pointwise",
    "_reorder_linear_weight",
    "_reorder_convolution_weight",
)


MOST_LAYOUTS = 3
"""Of a convolution's product and of its gradient: inputs of further shapes take the place of the oldest."""


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and all(hasattr(_MKLDNN, name) for name in _OPERATORS)


@functools.cache
def _supports(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return _has_onednn() and bool(_MKLDNN._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and _has_onednn()


def why_not_frozen(module: nn.Module) -> str:
    """Why a module's weights cannot be taken as constant, or ""."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(module).__name__}, not a Linear or Conv2d"
    if any(parameter.requires_grad for parameter in module.parameters()):
        return "its parameters are trained (requires_grad)"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"its padding is {module.padding!r}, {module.padding_mode}"
    return ""


def why_not_packed(module: nn.Module) -> str:
    """Why a frozen module gains nothing from a layout of its own, or "". A module on meta may come to the CPU."""
    if not _has_onednn():
        return "this build of torch has no oneDNN"
    weight: Any = module.weight
    if type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        return f"its weight is a {type(weight).__name__}, which is no plain matrix"
    if weight.device.type not in ("cpu", "meta"):
        return f"it is on {weight.device}; only CPU weights have a layout of their own"
    return "" if _supports(weight.dtype) else f"oneDNN does not multiply {weight.dtype} on this CPU"


def _parameters(module: Any) -> tuple[Tensor, ...]:
    """Of a Linear or Conv2d. `module.parameters()`, which knows any module, takes ten times as long in every call."""
    return (module.weight,) if module.bias is None else (module.weight, module.bias)


def version_of(tensor: Tensor) -> tuple:
    """What changes when a tensor is replaced or written to, except through `.data` or shared memory."""
    address = id(tensor) if isinstance(tensor, FakeTensor) else tensor.data_ptr()  # a fake one has no memory
    return address, 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.shape


class _Frozen:
    """A weight in oneDNN's layouts: one for the product, one for the gradient of its input, each made when needed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._layouts: dict[tuple, Tensor] = {}  # the last used is the last
        self._seen: tuple = ()

    def layout(self, kind: str, x: Tensor) -> Tensor:
        seen = version_of(self.weight)
        if seen != self._seen:
            self._layouts.clear()
            self._seen = seen
        # The layout decides speed and order of summation. A function of the shape alone, results do not depend on what
        # came before.
        shape = self._shape_that_matters(x)
        key = (kind, x.dtype, shape)
        found = self._layouts.pop(key, None)
        if found is None:
            of_kind = [other for other in self._layouts if other[0] == kind]
            for oldest in of_kind[: max(0, len(of_kind) + 1 - MOST_LAYOUTS)]:
                del self._layouts[oldest]
            with torch.no_grad():
                found = self._make(kind, x.dtype, shape)
        self._layouts[key] = found
        return found

    def _shape_that_matters(self, x: Tensor) -> tuple[int, ...]:
        return ()

    def bias_like(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().to(x.dtype)

    def refresh(self) -> None:
        """Forgets the layouts; needed after a change through `.data` only, others are noticed."""
        self._layouts.clear()

    def _make(self, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype in which x takes the fast way; None where torch's own product runs."""
        if torch.compiler.is_compiling():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        fast = (
            x.device.type == self.weight.device.type == "cpu"
            and (x.dtype == dtype or torch.is_autocast_enabled("cpu"))
            and x.numel() > 0
            and _supports(dtype)
            and not (self.weight.requires_grad and torch.is_grad_enabled())
            and not is_in_torch_dispatch_mode()  # tracers, and those who count, know torch's own products only
        )
        return dtype if fast else None


class _Product(torch.autograd.Function):
    """y = layer(x) + residual. The gradient of the residual is that of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.forward(x, residual)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        grad_x = ctx.layer.input_gradient(grad_y, ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_y if ctx.needs_input_grad[1] else None, None


def _run(layer: Any, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return _Product.apply(x, residual, layer)
    return layer.forward(x, residual)


class FrozenProduct(_Frozen):
    """x weight^T + bias, with weight [out, in] and bias [out] or None."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in], residual [..., out] -> [..., out]."""
        dtype = self._dtype(x)
        if dtype is None:
            y = F.linear(x, self.weight, self.bias)
            return y if residual is None else y + residual
        return _run(self, x, residual, dtype)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 1 and rows.dtype == torch.float32:
            # A matrix times a vector, as in writing token by token: at 256 channels oneDNN takes three times as long.
            y = F.linear(x, self.weight, self.bias_like(x))
            return y if residual is None else y + residual
        weight = self.layout("product", rows)
        if residual is None:
            y = _MKLDNN._linear_pointwise(rows, weight, self.bias_like(x), "none", [], "")
        else:
            add = residual.reshape(-1, residual.shape[-1])
            y = _MKLDNN._linear_pointwise.binary(rows, add, weight, self.bias_like(x), "add")
        return y.view(*x.shape[:-1], y.shape[-1])

    def input_gradient(self, grad_y: Tensor, shape: torch.Size) -> Tensor:
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        return _MKLDNN._linear_pointwise(rows, self.layout("gradient", rows), None, "none", [], "").view(shape)

    def _make(self, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        weight = self.weight.detach().to(dtype)
        weight = weight if kind == "product" else weight.t()
        return _MKLDNN._reorder_linear_weight(weight.contiguous())


class FrozenLinear(FrozenProduct):
    """The product with the weight of an `nn.Linear`, or with those of several that take the same input.

    Raises ValueError where `why_not_frozen` names an obstacle, or several weights do not fit.
    """

    def __init__(self, *modules: nn.Linear) -> None:
        for module in modules:
            if reason := why_not_frozen(module):
                raise ValueError(f"the layer cannot be frozen: {reason}")
        self._modules = modules
        self._sources: tuple = ()
        super().__init__(*self._joined())

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        first = self._modules[0]
        if len(self._modules) == 1:
            return first.weight, first.bias
        if any((module.bias is None) != (first.bias is None) for module in self._modules):
            raise ValueError("layers can be joined when all or none of them have a bias")
        self._sources = tuple(version_of(parameter) for module in self._modules for parameter in _parameters(module))
        bias = None if first.bias is None else torch.cat([module.bias.detach() for module in self._modules])
        return torch.cat([module.weight.detach() for module in self._modules]), bias

    def refresh(self) -> None:
        super().refresh()
        self.weight, self.bias = self._joined()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in], residual [..., out] -> [..., out]; several layers' results side by side."""
        if torch.is_grad_enabled() and any(p.requires_grad for module in self._modules for p in _parameters(module)):
            y = torch.cat([F.linear(x, module.weight, module.bias) for module in self._modules], dim=-1)
            return y if residual is None else y + residual
        if self._sources:
            now = tuple(version_of(parameter) for module in self._modules for parameter in _parameters(module))
            if now != self._sources:
                self.refresh()
        elif self._modules[0].weight is not self.weight:
            self.refresh()
        return super().__call__(x, residual)


class FrozenConv2d(_Frozen):
    """The convolution of an `nn.Conv2d` over channels-last pictures; others are brought to that format.

    Raises ValueError where `why_not_frozen` names an obstacle.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        if reason := why_not_frozen(module):
            raise ValueError(f"the layer cannot be frozen: {reason}")
        super().__init__(module.weight, module.bias)
        self._module = module
        self._stride, self._padding = list(module.stride), [int(p) for p in module.padding]
        self._dilation, self._groups = list(module.dilation), module.groups
        extents = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        # The gradient of a convolution without strides is a convolution with the mirrored weight.
        self._mirrored_padding = [e - p for e, p in zip(extents, self._padding, strict=True)]
        self._mirrors = module.groups == 1 and self._stride == [1, 1] and min(self._mirrored_padding) >= 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, C, h, w], residual [B, O, h', w'] -> [B, O, h', w']."""
        if self._module.weight is not self.weight:
            self.weight, self.bias = self._module.weight, self._module.bias
        dtype = self._dtype(x) if x.dim() == 4 else None
        if dtype is None:
            y = self._module._conv_forward(x, self.weight, self.bias)
            return y if residual is None else y + residual
        return _run(self, x, residual, dtype)

    def _shape_that_matters(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def _convolve(self, x: Tensor, residual: Tensor | None, kind: str, bias: Tensor | None, padding: list) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        shape = (padding, self._stride, self._dilation, self._groups)
        weight = self.layout(kind, x)
        if residual is None:
            return _MKLDNN._convolution_pointwise(x, weight, bias, *shape, "none", [], "")
        residual = residual.contiguous(memory_format=torch.channels_last)
        return _MKLDNN._convolution_pointwise.binary(x, residual, weight, bias, *shape, "add", 1.0, None, [], None)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._convolve(x, residual, "product", self.bias_like(x), self._padding)

    def input_gradient(self, grad_y: Tensor, shape: torch.Size) -> Tensor:
        if self._mirrors:
            return self._convolve(grad_y, None, "gradient", None, self._mirrored_padding)
        x = torch.empty(shape, dtype=grad_y.dtype, memory_format=torch.channels_last)
        shape_of = (self._stride, self._padding, self._dilation, False, [0, 0], self._groups)
        weight = self.weight.to(grad_y.dtype)
        return torch.ops.aten.convolution_backward(grad_y, x, weight, None, *shape_of, [True, False, False])[0]

    def _make(self, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        weight, padding = self.weight.detach().to(dtype), self._padding
        if kind == "gradient":
            weight, padding = weight.flip(2, 3).transpose(0, 1), self._mirrored_padding
        weight = weight.contiguous(memory_format=torch.channels_last)
        return _MKLDNN._reorder_convolution_weight(
            weight, padding, self._stride, self._dilation, self._groups, list(shape)
        )


class FrozenUpsample(FrozenConv2d):
    """A 3x3 convolution over a picture doubled in both directions by repeating its pixels, without doubling it.

    Of the nine pixels under such a kernel only four differ. Each of the four positions of a doubled pixel has its own
    2x2 kernel, of sums of the nine weights, so 16 products instead of 36 make the four results: one convolution with
    four times the channels, and a pass that puts them into their places.

    Raises ValueError where `why_not_frozen` names an obstacle, or the convolution is another.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        if geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1):
            raise ValueError(f"the layer cannot be frozen: it is no plain 3x3 convolution with padding 1: {module}")
        super().__init__(module)
        self._convolution = FrozenConv2d(module)
        self._source = module.weight, module.bias
        self._sources: tuple = ()
        self._mirrored_padding = [0, 0]  # of the 2x2 kernels, whose padding is one pixel like that of the 3x3 kernel

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, C, h, w] -> [B, O, 2 h, 2 w]."""
        module = self._module
        self.weight, self.bias = module.weight, module.bias  # by these _dtype decides
        dtype = self._dtype(x) if x.dim() == 4 else None
        if dtype is None or residual is not None:
            y = self._convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return y if residual is None else y + residual
        now = tuple(version_of(parameter) for parameter in _parameters(module))
        if now != self._sources:
            self.refresh()
            self._sources = now
        return _run(self, x, None, dtype)

    def refresh(self) -> None:
        super().refresh()
        self._convolution.refresh()
        self._sources = ()

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        bias = self.bias_like(x)
        z = self._convolve(x, None, "product", None if bias is None else bias.repeat(4), [1, 1])
        shape = (x.shape[0], z.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        for place, part in _places(y, z):
            place.copy_(part)
        return y

    def input_gradient(self, grad_y: Tensor, shape: torch.Size) -> Tensor:
        sides = [side + 1 for side in shape[2:]]
        channels = 4 * grad_y.shape[1]
        z = torch.empty((shape[0], channels, *sides), dtype=grad_y.dtype, memory_format=torch.channels_last).zero_()
        for place, part in _places(grad_y.contiguous(memory_format=torch.channels_last), z):
            part.copy_(place)
        return self._convolve(z, None, "gradient", None, self._mirrored_padding)

    def _make(self, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        rows = [[0], [1, 2]], [[0, 1], [2]]  # of the 3x3 kernel: under the upper and the lower pixel, in either row
        weight = self._module.weight.detach().float()
        kernels = [
            torch.stack([torch.stack([weight[:, :, r][..., c].sum((2, 3)) for c in columns], -1) for r in across], -2)
            for across in rows
            for columns in rows
        ]
        joined = torch.cat(kernels).to(dtype)
        padding = [1, 1]
        if kind == "gradient":
            joined, padding = joined.flip(2, 3).transpose(0, 1), self._mirrored_padding
        joined = joined.contiguous(memory_format=torch.channels_last)
        return _MKLDNN._reorder_convolution_weight(joined, padding, [1, 1], [1, 1], 1, list(shape))


def _places(y: Tensor, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of y [B, O, 2h, 2w] at each of the four positions, and of z [B, 4 O, h + 1, w + 1] with its results."""
    batch, channels, height, width = y.shape
    height, width = height // 2, width // 2
    doubled = y.permute(0, 2, 3, 1).view(batch, height, 2, width, 2, channels)
    parts = z.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels))
    for a in range(2):
        for b in range(2):
            yield doubled[:, :, a, :, b], parts[:, a : a + height, b : b + width, a, b]
