"""Frozen layers against torch's own, with gradients of the input and of the residual."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dreamkernels.frozen
from dreamkernels.frozen import (
    MOST_LAYOUTS,
    FrozenConv2d,
    FrozenLinear,
    FrozenUpsample,
    version_of,
    why_not_frozen,
    why_not_packed,
)
from tests.support.operators import assert_close_to_float64, assert_summed, dtype_name

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
@pytest.mark.parametrize("sides", [(7, 9), (1, 1), (8, 8)], ids=str)
def test_convolution_of_a_doubled_picture(sides, bias, dtype):
    """In bfloat16, where sums of weights are rounded once more, against eager's error; in float32 within the bound of
    any order of summation, as for linear layers, of the 144 products of a result and the 864 of a gradient."""
    module = frozen(nn.Conv2d(16, 24, 3, padding=1, bias=bias), dtype)
    layer, exact_module = FrozenUpsample(module), copy.deepcopy(module).double()
    x = torch.randn(2, 16, *sides, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(2, 24, *(2 * side for side in sides))

    def results(function, x, gradient=gradient):
        y = function(x)
        return y, *torch.autograd.grad(y, x, gradient.to(y.dtype))

    def doubling(module):
        return lambda x: module(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))

    ours, eager = results(layer, x), results(doubling(module), x)
    exact = results(doubling(exact_module), x.detach().double().requires_grad_())
    for parameter in exact_module.parameters():
        parameter.abs_()
    magnitudes = results(doubling(exact_module), x.detach().double().abs().requires_grad_(), gradient.abs())
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    for mine, theirs, truth, magnitude in zip(ours, eager, exact, magnitudes, strict=True):
        if dtype == torch.float32:
            assert_summed(mine, truth, magnitude, terms=864)
        else:
            assert (mine.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


def test_the_doubling_convolution_notices_changes():
    module, x = frozen(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 5, 5)
    layer = FrozenUpsample(module)
    for _ in range(2):
        expected = module(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            module.weight.mul_(2)
            module.bias.add_(1)
    with pytest.raises(ValueError, match="no plain 3x3 convolution"):
        FrozenUpsample(frozen(nn.Conv2d(4, 4, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(320,), (50, 320), (2, 25, 320)], ids=str)
def test_linear(shape, bias, dtype):
    """Within the bound of any order of summation (Higham 2002, section 3.1) and one rounding of the result; eager
    PyTorch's own error in float32 is that of another library's order."""
    module = frozen(nn.Linear(320, 70, bias=bias), dtype)
    layer, weight = FrozenLinear(module), module.weight.double()
    offset = 0 if module.bias is None else module.bias.double()
    for residual in (None, torch.randn(*shape[:-1], 70, dtype=dtype, requires_grad=True)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y, added = layer(x, residual), 0 if residual is None else residual.double()
        exact, magnitude = x.double() @ weight.T + offset + added, x.double().abs() @ weight.abs().T
        magnitude = magnitude + torch.as_tensor(offset).abs() + torch.as_tensor(added).abs()
        assert_summed(y, exact, magnitude, terms=322)
        grad_y = torch.randn_like(y)
        grad_x, *grad_residual = torch.autograd.grad(y, [x] if residual is None else [x, residual], grad_y)
        assert_summed(grad_x, grad_y.double() @ weight, grad_y.double().abs() @ weight.abs(), terms=70)
        assert all(torch.equal(found, grad_y) for found in grad_residual)


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


def test_layers_that_are_trained_again_get_their_gradients():
    modules = [frozen(nn.Linear(6, 6)), frozen(nn.Linear(6, 6)), frozen(nn.Conv2d(6, 6, 3))]
    layers = [FrozenLinear(modules[0]), FrozenLinear(*modules[:2]), FrozenConv2d(modules[2])]
    for module, layer in zip(modules, layers, strict=True):
        module.requires_grad_(True)
        layer(torch.randn(1, 6, 6, 6)).sum().backward()
        assert module.weight.grad is not None


def test_results_do_not_depend_on_what_came_before():
    x = torch.randn(3, 64, 8, 8)
    for make in (lambda: nn.Conv2d(64, 64, 3, padding=1), lambda: nn.Linear(8, 64)):
        module = frozen(make())
        kind = FrozenConv2d if isinstance(module, nn.Conv2d) else FrozenLinear
        fresh, used = kind(module), kind(module)
        for rows in range(1, 8):
            used(torch.randn(rows, 64, 2, 8))
        assert torch.equal(fresh(x), used(x))
        assert len(used._layouts) <= MOST_LAYOUTS


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


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3, padding=1, stride=2)])
def test_autocast_casts_as_the_module_does(make):
    module = frozen(make())
    layer = FrozenConv2d(module) if isinstance(module, nn.Conv2d) else FrozenLinear(module)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)

    def run(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x)
        return y, *torch.autograd.grad(y.float().square().sum(), x)

    for ours, theirs in zip(run(layer), run(module), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_tracers_and_counters_see_the_module_itself():
    module = frozen(nn.Linear(8, 8))
    layer, x = FrozenLinear(module), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(layer.__call__, backend="eager", fullgraph=True)(x), module(x))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 8


def test_layers_may_come_from_meta_and_change_their_dtype():
    module = frozen(nn.Linear(5, 6, device="meta"))
    joined = FrozenLinear(module, frozen(nn.Linear(5, 2, device="meta")))
    layer = FrozenLinear(module)
    for loaded in joined._modules:
        loaded.to_empty(device="cpu")
        nn.init.normal_(loaded.weight)
        nn.init.normal_(loaded.bias)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), module(x))
    torch.testing.assert_close(joined(x)[:, :6], module(x))
    for dtype in (torch.float64, torch.bfloat16):
        for part in joined._modules:
            part.to(dtype)
        torch.testing.assert_close(layer(x.to(dtype)), module(x.to(dtype)))
        torch.testing.assert_close(joined(x.to(dtype))[:, :6], module(x.to(dtype)))


def test_without_onednn_the_module_runs(monkeypatch):
    monkeypatch.setattr(dreamkernels.frozen, "_supports", lambda dtype: False)
    linear, convolution = frozen(nn.Linear(5, 6)), frozen(nn.Conv2d(5, 6, 3, padding=1))
    x, picture = torch.randn(3, 5), torch.randn(1, 5, 4, 4)
    assert torch.equal(FrozenLinear(linear)(x), linear(x))
    assert torch.equal(FrozenConv2d(convolution)(picture), convolution(picture))
    doubled = nn.functional.interpolate(picture, scale_factor=2.0, mode="nearest")
    assert torch.equal(FrozenUpsample(convolution)(picture), convolution(doubled))


def test_obstacles_are_named():
    assert "requires_grad" in why_not_frozen(nn.Linear(2, 2))
    assert "LayerNorm, not a Linear or Conv2d" in why_not_frozen(nn.LayerNorm(2))
    assert "torch.float64" in why_not_packed(frozen(nn.Linear(2, 2), torch.float64))
    assert why_not_packed(frozen(nn.Linear(2, 2, device="meta"))) == ""
    assert "reflect" in why_not_frozen(frozen(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")))
    assert "'same'" in why_not_frozen(frozen(nn.Conv2d(2, 2, 3, padding="same")))
    with pytest.raises(ValueError, match="cannot be frozen: its parameters are trained"):
        FrozenLinear(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be frozen: its parameters are trained"):
        FrozenConv2d(nn.Conv2d(2, 2, 1))


def test_versions_of_tensors_without_memory(recwarn):
    with FakeTensorMode():
        first, second = torch.empty(2, 3), torch.empty(2, 3)
        before = version_of(first)
        assert before == version_of(first) != version_of(second)
        first.add_(1)
        assert version_of(first) != before
    assert not recwarn.list
