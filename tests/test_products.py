"""Products of linear layers in oneDNN against exact sums, and where torch's own runs instead."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dreamkernels.products
from dreamkernels.products import LEAST_FLOPS, linear, linear_layer
from tests.support.operators import assert_summed

ROWS, IN, OUT = 96, 160, 144
assert 2 * ROWS * IN * OUT >= LEAST_FLOPS


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Also on processors where torch's own library is as fast."""
    if dreamkernels.products._PRODUCT is None:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(dreamkernels.products, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def ran_in_onednn(function, *arguments) -> bool:
    with Names() as seen:
        function(*arguments)
    return "mkldnn::_linear_pointwise" in seen.names


def inputs(bias=True, **options):
    x = torch.randn(2, ROWS // 2, IN, requires_grad=True, **options)
    weight = torch.randn(OUT, IN, requires_grad=True, **options)
    return x, weight, torch.randn(OUT, requires_grad=True, **options) if bias else None


@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_sums_of_products(bias):
    x, weight, offset = inputs(bias)
    y = linear(x, weight, offset)
    grad_y = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, weight] + [offset] * bias, grad_y)
    rows, grads, matrix = x.detach().flatten(0, 1).double(), grad_y.flatten(0, 1).double(), weight.detach().double()
    added = offset.detach().double() if bias else torch.zeros(OUT).double()
    exact, magnitude = rows @ matrix.T + added, rows.abs() @ matrix.abs().T + added.abs()
    assert_summed(y.detach().flatten(0, 1), exact, magnitude, terms=IN + 1)
    assert_summed(gradients[0].flatten(0, 1), grads @ matrix, grads.abs() @ matrix.abs(), terms=OUT)
    assert_summed(gradients[1], grads.T @ rows, grads.T.abs() @ rows.abs(), terms=ROWS)
    if bias:
        assert_summed(gradients[2], grads.sum(0), grads.abs().sum(0), terms=ROWS)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)], ids=str)
def test_only_what_is_wanted_is_multiplied(trained):
    x, weight, _ = inputs(bias=False)
    x.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    y = linear(x, weight)
    with Names() as seen:
        y.sum().backward()
    assert seen.names.count("mkldnn::_linear_pointwise") == sum(trained)
    assert [t.grad is not None for t in (x, weight)] == list(trained)


def test_repeats_bit_for_bit():
    x, weight, bias = inputs()

    def run():
        y = linear(x, weight, bias)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_strided_inputs_and_weights():
    x, weight, bias = inputs()
    wide, across = torch.randn(ROWS, 2 * IN)[:, ::2], torch.randn(IN, OUT).t()
    torch.testing.assert_close(linear(wide, weight), F.linear(wide, weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear(x, across, bias), F.linear(x, across, bias), rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    x, weight, bias = inputs()
    direction = torch.randn_like(x)

    def curvature(function):
        y = function(x, weight, bias)
        (gradient,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), (x, weight))

    for ours, torchs in zip(curvature(linear), curvature(F.linear), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-5)


def test_torchs_own_product_runs_where_it_should(monkeypatch):
    x, weight, bias = inputs()
    assert ran_in_onednn(linear, x, weight, bias)
    assert not ran_in_onednn(linear, x[:, :4], weight, bias)  # small
    assert not ran_in_onednn(linear, *inputs(dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    per_row = torch.vmap(lambda row: linear(row, weight, bias))(x)
    torch.testing.assert_close(per_row, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(dreamkernels.products, "onednn_is_faster", lambda: False)
    assert not ran_in_onednn(linear, x, weight, bias)


def test_the_choice_depends_on_the_processor_only(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for maker, expected in (("AuthenticAMD", True), ("GenuineIntel", False), ("", False)):
        monkeypatch.setattr(dreamkernels.products, "_maker", lambda maker=maker: maker)
        assert dreamkernels.products.onednn_is_faster.__wrapped__() is (expected and torch.backends.mkl.is_available())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(dreamkernels.products, "_maker", lambda: "AuthenticAMD")
    assert not dreamkernels.products.onednn_is_faster.__wrapped__()


def test_counters_compilers_and_fake_tensors_understand():
    x, weight, bias = inputs()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * ROWS * IN * OUT
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, bias)]
        assert linear(*fakes).shape == (2, ROWS // 2, OUT)
        assert ran_in_onednn(linear, *fakes)  # so that a plan meets the operators of a measured step


def test_a_module_that_is_wrapped_or_watched_runs_itself():
    module, x = nn.Linear(IN, OUT), torch.randn(ROWS, IN)
    assert ran_in_onednn(linear_layer, module, x)
    seen = []
    handle = module.register_forward_hook(lambda *call: seen.append(call))
    linear_layer(module, x)
    assert len(seen) == 1
    handle.remove()
    module.forward = lambda x: x
    assert linear_layer(module, x) is x

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(IN, OUT)
    assert torch.equal(linear_layer(doubled, x), doubled(x))
