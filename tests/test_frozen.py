"""Frozen layers against torch's own, with gradients of the input and of the residual."""

import copy

import pytest
import torch
from torch import nn

from dreamkernels.frozen import FrozenConv2d, FrozenLinear, why_not_frozen
from tests.support.operators import assert_close_to_float64, dtype_name

DTYPES = (torch.float32, torch.bfloat16)
CONVOLUTIONS = {
    "3x3": ((8, 12, 3), {"padding": 1}),
    "without bias": ((8, 12, 3), {"padding": 1, "bias": False}),
    "1x1": ((8, 12, 1), {}),
    "stride 2": ((8, 12, 3), {"padding": 1, "stride": 2}),
    "no padding": ((8, 12, 3), {}),
    "wide padding": ((8, 12, 3), {"padding": 3}),
    "groups": ((8, 12, 3), {"padding": 1, "groups": 4}),
    "dilation": ((8, 12, 3), {"padding": 2, "dilation": 2}),
    "oblong": ((8, 12, (3, 5)), {"padding": (1, 2)}),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def frozen(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return module.to(dtype).requires_grad_(False)


def plain(module: nn.Module):
    """module(x) + residual in the dtype of x."""

    def run(x, residual=None):
        y = module.to(x.dtype)(x)
        return y if residual is None else y + residual

    return run


def check(layer, module, dtype, make_x, out_shape):
    """Without and with a residual; small tensors need several trials."""

    def make_residual():
        return [torch.randn(out_shape, dtype=dtype).requires_grad_()]

    for residual in (list, make_residual):
        assert_close_to_float64(
            layer, plain(module), lambda r=residual: [make_x().to(dtype).requires_grad_(), *r()], trials=8
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "channels first"])
def test_convolution(kind, dtype, channels_last):
    sizes, options = CONVOLUTIONS[kind]
    module = frozen(nn.Conv2d(*sizes, **options), dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make_x():
        return torch.randn(2, 8, 9, 11).to(memory_format=layout)

    shape = module(make_x().to(dtype)).shape
    check(FrozenConv2d(module), copy.deepcopy(module), dtype, make_x, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (3, 33), (2, 3, 33)], ids=str)
def test_linear(shape, bias, dtype):
    module = frozen(nn.Linear(33, 7, bias=bias), dtype)
    check(FrozenLinear(module), copy.deepcopy(module), dtype, lambda: torch.randn(shape), (*shape[:-1], 7))


def test_joined_layers_give_their_results_side_by_side():
    modules = [frozen(nn.Linear(6, n)) for n in (3, 4, 5)]
    joined, x = FrozenLinear(*modules), torch.randn(2, 7, 6)
    torch.testing.assert_close(joined(x), torch.cat([module(x) for module in modules], dim=-1))
    with torch.no_grad():
        modules[1].weight.mul_(3)
        modules[2].bias.add_(1)
    torch.testing.assert_close(joined(x), torch.cat([module(x) for module in modules], dim=-1))
    with pytest.raises(ValueError, match="all or none of them have a bias"):
        FrozenLinear(modules[0], frozen(nn.Linear(6, 2, bias=False)))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 3, padding=1)], ids=["linear", "conv"]
)
def test_changes_of_the_weight_are_noticed(make):
    module = frozen(make())
    layer = FrozenConv2d(module) if isinstance(module, nn.Conv2d) else FrozenLinear(module)
    x = torch.randn(2, 6, 6, 6, requires_grad=True)

    def same():
        (ours,) = torch.autograd.grad(layer(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(module(x).square().sum(), x)
        torch.testing.assert_close(layer(x), module(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    same()
    with torch.no_grad():
        module.weight.add_(1)
    same()
    module.weight = nn.Parameter(torch.randn_like(module.weight), requires_grad=False)
    same()
    module.weight.data = torch.randn_like(module.weight)
    same()
    module.weight.data.mul_(2)  # through .data nobody is told
    layer.refresh()
    same()


def test_batches_of_other_sizes_and_none():
    module = frozen(nn.Conv2d(4, 5, 3, padding=1))
    layer = FrozenConv2d(module)
    for shape in ((1, 4, 8, 8), (3, 4, 8, 8), (1, 4, 5, 30), (0, 4, 8, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), module(x))
    linear = frozen(nn.Linear(4, 5))
    for shape in ((1, 4), (100, 4), (0, 4), (2, 0, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(FrozenLinear(linear)(x), linear(x))


def test_autocast_and_compile_run_the_module_itself():
    module = frozen(nn.Linear(8, 8))
    layer, x = FrozenLinear(module), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(layer.__call__, backend="eager", fullgraph=True)(x), module(x))


def test_obstacles_are_named():
    assert "requires_grad" in why_not_frozen(nn.Linear(2, 2))
    assert "LayerNorm, not a Linear or Conv2d" in why_not_frozen(nn.LayerNorm(2))
    assert "torch.float64" in why_not_frozen(frozen(nn.Linear(2, 2), torch.float64))
    assert "meta" in why_not_frozen(frozen(nn.Linear(2, 2, device="meta")))
    assert "reflect" in why_not_frozen(frozen(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")))
    assert "'same'" in why_not_frozen(frozen(nn.Conv2d(2, 2, 3, padding="same")))
    with pytest.raises(ValueError, match="cannot be frozen: its parameters are trained"):
        FrozenLinear(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be frozen: its parameters are trained"):
        FrozenConv2d(nn.Conv2d(2, 2, 1))
