"""group_norm_silu on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from dreamkernels import group_norm_silu
from dreamkernels.nn import GroupNormSiLU
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    assert_within_eager_error,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.group_norm_silu import LAYOUTS, SHAPES, inputs, reference, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


def ours(groups, activation="silu", implementation="auto"):
    def run(x, weight=None, bias=None, shift=None):
        return group_norm_silu(x, groups, weight, bias, 1e-5, activation, shift, implementation)

    return run


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, layout, dtype, shape, groups):
    if isa == "scalar" and torch.Size(shape).numel() > 100_000:
        pytest.skip("slow; the same code at the other levels")
    with using_cpu_isa(isa):
        assert_close_to_float64(ours(groups), reference(groups), lambda: inputs(shape, dtype, layout), trials(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES, ((2, 320, 64, 64), 32)], ids=str)
def test_gpu_is_as_exact_as_eager(layout, dtype, shape, groups):
    make = lambda: inputs(shape, dtype, layout, "cuda")  # noqa: E731
    assert_close_to_float64(ours(groups), reference(groups), make, trials(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_without_activation_and_without_parameters(layout, dtype):
    for count in (1, 2, 3, 4):
        for activation in ("none", "silu"):
            make = lambda count=count: inputs((2, 24, 5, 7), dtype, layout)[:count]  # noqa: E731
            assert_close_to_float64(ours(3, activation), reference(3, activation), make, 16)


def test_any_number_of_dimensions():
    for shape in ((5, 12), (3, 12, 50), (2, 12, 3, 4, 5)):
        assert_close_to_float64(ours(4), reference(4), lambda shape=shape: _rowmajor(shape), 8)


def _rowmajor(shape):
    return [torch.randn(shape).requires_grad_(), torch.randn(12).requires_grad_()]


def test_channels_last_3d_is_kept():
    x = torch.randn(2, 12, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = group_norm_silu(x, 4)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, reference(4)(x))


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_does_not_cancel(isa, layout):
    """Values of 10^4 with deviations of 1: float32 holds them to 5e-4, and nothing more is lost."""
    x, weight, bias, shift = (t.detach() for t in inputs((2, 20, 40, 41), torch.float32, layout, mean=1e4))
    exact = reference(2)(*(t.double() for t in (x, weight, bias, shift)))
    with using_cpu_isa(isa):
        y = ours(2)(x, weight, bias, shift)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_first_row_unlike_the_rest_does_not_spoil_the_variance(layout):
    """A black border: what a variance around the first value would lose everything to."""
    x = (1000 + torch.randn(1, 4, 64, 64)).contiguous(memory_format=LAYOUTS[layout])
    x[:, :, 0] = 0.0
    exact = reference(2)(x.double())
    torch.testing.assert_close(group_norm_silu(x, 2).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_shift_is_the_sum_over_positions(layout):
    x, weight, bias, shift = inputs((2, 24, 9, 7), torch.float32, layout)
    gradient = torch.randn(2, 24, 9, 7)
    grad_x, grad_shift = torch.autograd.grad(ours(4)(x, weight, bias, shift), [x, shift], gradient)
    torch.testing.assert_close(grad_shift, grad_x.sum((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_only_needed_gradients_are_made_and_they_are_the_same(layout, dtype):
    arguments = inputs((2, 40, 6, 5), dtype, layout)
    gradient = torch.randn(2, 40, 6, 5).to(dtype)
    every = torch.autograd.grad(ours(4)(*arguments), arguments, gradient)
    for k, expected in enumerate(every):
        alone = [t.detach() for t in arguments]
        alone[k].requires_grad_()
        (found,) = torch.autograd.grad(ours(4)(*alone), alone[k], gradient)
        assert torch.equal(found, expected)
    x, weight, bias, shift = (t.detach() for t in arguments)
    statistics = torch.zeros(2, 4), torch.ones(2, 4)
    none = OPERATORS["group_norm_silu_backward"].overloads["default"](
        gradient, x, shift, weight, bias, *statistics, 4, True, False, False, False
    )
    assert [t.numel() for t in none] == [0, 0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_kept_and_a_gradient_in_the_other_one_is_taken(layout):
    x, weight, bias, _ = inputs((2, 24, 6, 5), torch.bfloat16, layout)
    y = ours(4)(x, weight, bias)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    gradient = torch.randn(2, 24, 6, 5).bfloat16()
    results = []
    for memory_format in LAYOUTS.values():
        other = gradient.contiguous(memory_format=memory_format)
        (grad_x,) = torch.autograd.grad(y, x, other, retain_graph=True)
        assert grad_x.is_contiguous(memory_format=LAYOUTS[layout])
        results.append(grad_x)
    assert torch.equal(*results)


def test_a_slice_of_channels_last_stays_channels_last():
    wide = torch.randn(2, 40, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    x = wide[:, 8:32].requires_grad_()
    assert not x.is_contiguous(memory_format=torch.channels_last)
    y = group_norm_silu(x, 4)
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad_x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, group_norm_silu(x.contiguous(memory_format=torch.channels_last), 4))


def test_strided_and_misaligned_inputs():
    x = torch.randn(2, 6, 5, 24).permute(0, 3, 2, 1)[:, :, ::2].requires_grad_()
    weight = torch.randn(48)[::2].requires_grad_()
    assert_close_to_float64(ours(4), reference(4), lambda: [x, weight])
    assert ours(4)(x).is_contiguous()
    storage = torch.randn(2 * 24 * 30 + 1)[1:].view(2, 24, 5, 6)
    assert torch.equal(ours(4)(storage), ours(4)(storage.clone()))


def test_large_groups_take_the_gradient_without_a_buffer():
    """More elements than a thread's buffer holds: the sigmoid is computed again. (float32 needs no buffer.)"""
    x, weight, bias, _ = inputs((1, 3, 300, 301), torch.bfloat16)
    assert_close_to_float64(ours(1), reference(1), lambda: [x, weight, bias])


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(layout, samples):
    arguments = inputs((samples, 72, 48, 31), torch.bfloat16, layout)
    gradient = torch.randn(samples, 72, 48, 31).bfloat16()

    def everything():
        y = ours(4)(*arguments)
        return [t.contiguous() for t in (y, *torch.autograd.grad(y, arguments, gradient))]

    assert_repeats_bitwise(everything)


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    arguments = inputs((2, 24, 5, 6), torch.bfloat16, "last")
    with torch.no_grad():
        light = ours(4)(*arguments)
    assert not light.requires_grad
    assert torch.equal(light, ours(4)(*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration(layout):
    x, weight, bias, shift = inputs((2, 12, 3, 5), torch.bfloat16, layout)
    operator = OPERATORS["group_norm_silu"]
    check_operator(
        operator.overloads["default"],
        [
            (x, shift, weight, bias, 3, 1e-5, True),
            (x.transpose(2, 3).detach(), None, None, None, 4, 1e-5, False),
            (x.detach()[:, ::2], None, None, None, 2, 1e-5, True),
            (x.detach()[:, 4:], None, None, None, 2, 1e-5, True),
        ],
    )
    plain = [t.detach() for t in (x, shift, weight, bias)]
    check_operator(operator.overloads["inference"], [(*plain, 3, 1e-5, True)])
    _, mean, rstd = operator.overloads["inference"](*plain, 3, 1e-5, True)
    check_operator(
        OPERATORS["group_norm_silu_backward"].overloads["default"],
        [
            (plain[0], *plain, mean, rstd, 3, True, True, True, True),
            (plain[0], plain[0], None, None, None, mean, rstd, 3, False, True, False, False),
        ],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_once_with_gradients(layout):
    arguments = inputs((2, 12, 4, 6), torch.bfloat16, layout)
    assert_compiles_once(ours(3), [arguments] * 2)
    compiled = torch.compile(ours(3), fullgraph=True)
    expected = torch.autograd.grad(ours(3)(*arguments).float().square().sum(), arguments)
    found = torch.autograd.grad(compiled(*arguments).float().square().sum(), arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 4, dtype=torch.float64)}, "does not support"),
        ({"x": torch.zeros(8)}, "batch and a channel dimension"),
        ({"groups": 3}, r"8 channels cannot be divided into 3 groups; possible are \[1, 2, 4, 8\]"),
        ({"groups": 0}, "cannot be divided"),
        ({"activation": "gelu"}, r"activation 'gelu' is unknown \(silu, none\)"),
        ({"weight": torch.zeros(7)}, r"needs a weight \[8\], not \[7\]"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias has dtype"),
        ({"shift": torch.zeros(8)}, r"needs a shift \[2, 8\], not \[8\]"),
        ({"shift": torch.zeros(2, 8, device="meta")}, "shift is on meta"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "triton"}, "cannot run on cpu"),
        ({"implementation": "cuda"}, "no CUDA C"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 8, 4), "groups": 2, **change}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    x = torch.zeros(2, 8, 4)
    operator = OPERATORS["group_norm_silu"].overloads["default"]
    for arguments, message in (
        ((x, None, None, None, 3, 1e-5, True), "cannot be divided"),
        ((x, None, torch.zeros(7), None, 2, 1e-5, True), "weight"),
        ((x, torch.zeros(1, 8), None, None, 2, 1e-5, True), "shift"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
    backward = OPERATORS["group_norm_silu_backward"].overloads["default"]
    with pytest.raises(RuntimeError, match="mean and rstd"):
        backward(x, x, None, None, None, torch.zeros(2, 1), torch.zeros(2, 1), 2, True, True, False, False)


def test_module_is_a_drop_in_for_torch():
    x = torch.randn(2, 12, 4, 5)
    for affine in (True, False):
        theirs, module = torch.nn.GroupNorm(3, 12, 1e-6, affine), GroupNormSiLU(3, 12, 1e-6, affine)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        module.load_state_dict(theirs.state_dict())
        exact = F.silu(theirs.double()(x.double()))
        assert_within_eager_error(module(x), F.silu(theirs.float()(x)), exact.detach())
    shift = torch.randn(2, 12)
    torch.testing.assert_close(module(x, shift), module(x + shift[:, :, None, None]))
    assert "3, 12, eps=1e-06, activation=silu" in repr(module)
