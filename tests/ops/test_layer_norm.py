"""layer_norm on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from dreamkernels import layer_norm
from dreamkernels.nn import LayerNorm
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.layer_norm import SHAPES, inputs, reference, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, shape):
    with using_cpu_isa(isa):
        assert_close_to_float64(layer_norm, reference, lambda: inputs(shape, dtype), trials(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1024)], ids=str)
def test_gpu_is_as_exact_as_eager(dtype, shape):
    assert_close_to_float64(layer_norm, reference, lambda: inputs(shape, dtype, "cuda"), trials(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_rows_and_many_rows(dtype):
    assert_close_to_float64(layer_norm, reference, lambda: inputs((1500, 640), dtype))
    assert_close_to_float64(layer_norm, reference, lambda: inputs((3, 10000), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_small_and_large_magnitudes(dtype):
    for scale in (1e-2, 50.0):
        assert_close_to_float64(layer_norm, reference, lambda scale=scale: inputs((50, 100), dtype, scale=scale))


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_a_large_mean_does_not_cancel(isa):
    """The mean itself is a rounded float32: an error of half a unit of 1000 (3e-5) is shared by the row, no more."""
    x, weight, bias = (t.detach() for t in inputs((20, 333), torch.float32, mean=1000.0))
    exact = F.layer_norm(x.double(), (333,), weight.double(), bias.double())
    with using_cpu_isa(isa):
        torch.testing.assert_close(layer_norm(x, weight, bias).double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_weight_and_bias_may_be_absent(dtype, with_weight):
    def ours(x, weight=None):
        return layer_norm(x, weight, None)

    def theirs(x, weight=None):
        return reference(x, weight, None)

    assert_close_to_float64(ours, theirs, lambda: inputs((9, 70), dtype)[: 1 + with_weight], 16)


def test_strided_inputs_give_the_result_of_contiguous_ones():
    x, weight, bias = inputs((6, 10, 48), torch.bfloat16)
    assert_close_to_float64(layer_norm, reference, lambda: [x.transpose(0, 1), weight, bias])
    assert layer_norm(x[:, ::2], weight, bias).is_contiguous()
    wide = torch.randn(96, dtype=torch.bfloat16)[::2]
    assert torch.equal(layer_norm(x, wide, wide), layer_norm(x, wide.contiguous(), wide.contiguous()))


def test_misaligned_view():
    x, weight, bias = torch.randn(5 * 33 + 1)[1:].view(5, 33), torch.randn(34)[1:], torch.randn(34)[1:]
    assert torch.equal(layer_norm(x, weight, bias), layer_norm(x.clone(), weight.clone(), bias.clone()))


def test_only_needed_gradients_are_made():
    x, weight, bias = inputs((5, 24), torch.float32)
    layer_norm(x, weight.detach(), bias.detach()).square().sum().backward()
    grad_x, grad_weight, grad_bias = OPERATORS["layer_norm_backward"].overloads["default"](
        2 * layer_norm(x, weight, bias).detach(), x.detach(), weight.detach(), 1e-5, False
    )
    assert torch.equal(grad_x, x.grad)
    assert grad_weight.numel() == grad_bias.numel() == 0
    layer_norm(x.detach(), weight.detach(), bias).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full((24,), 5.0))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck_against_finite_differences():
    """float32 with a coarse step; the tolerance is that of the differences, not of the kernel."""
    assert torch.autograd.gradcheck(layer_norm, inputs((3, 9), torch.float32), eps=1e-2, atol=2e-3, rtol=2e-2)


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    arguments = inputs((700, 333), torch.bfloat16)
    gradient = torch.randn(700, 333).bfloat16()

    def everything():
        y = layer_norm(*arguments)
        return [y, *torch.autograd.grad(y, arguments, gradient)]

    assert_repeats_bitwise(everything)


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    arguments = inputs((5, 100), torch.bfloat16)
    with torch.no_grad():
        light = layer_norm(*arguments)
    assert not light.requires_grad
    assert torch.equal(light, layer_norm(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    x, weight, bias = inputs((3, 40), dtype)
    plain = [t.detach() for t in (x, weight, bias)]
    check_operator(
        OPERATORS["layer_norm"].overloads["default"],
        [(x, weight, bias, 1e-5), (x, None, None, 1e-5), (x.detach().t()[:40, :3], plain[1][:3], None, 1e-5)],
    )
    check_operator(OPERATORS["layer_norm"].overloads["inference"], [(*plain, 1e-5)])
    check_operator(
        OPERATORS["layer_norm_backward"].overloads["default"],
        [(plain[0], plain[0], plain[1], 1e-5, True), (plain[0], plain[0], None, 1e-5, False)],
    )


def test_compiles_once_with_gradients_and_dynamic_rows():
    def run(x, weight, bias):  # a default eps would be a symbol at first
        return layer_norm(x, weight, bias, 1e-5)

    calls = [inputs((rows, 64), torch.bfloat16) for rows in (8, 24, 40)]
    assert_compiles_once(run, calls[:1] * 2)
    assert_compiles_once(run, calls, backend="aot_eager", dynamic=True)
    compiled = torch.compile(run, fullgraph=True)
    expected = torch.autograd.grad(layer_norm(*calls[0]).float().square().sum(), calls[0])
    found = torch.autograd.grad(compiled(*calls[0]).float().square().sum(), calls[0])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "does not support"),
        ({"x": torch.zeros(())}, "no dimension to normalise"),
        ({"weight": torch.zeros(8, dtype=torch.bfloat16)}, "weight has dtype"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias has dtype"),
        ({"weight": torch.zeros(7)}, r"needs a weight \[8\], not \[7\]"),
        ({"bias": torch.zeros(8, 1)}, r"needs a bias \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "triton"}, "cannot run on cpu"),
        ({"implementation": "cuda"}, "no CUDA C"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "bias": torch.zeros(8), **change}
    with pytest.raises(ValueError, match=message):
        layer_norm(**arguments)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    operator = OPERATORS["layer_norm"].overloads["default"]
    with pytest.raises(RuntimeError, match="needs a weight"):
        operator(torch.zeros(2, 8), torch.zeros(7), None, 1e-5)
    with pytest.raises(RuntimeError, match="needs a bias"):
        operator(torch.zeros(2, 8), None, torch.zeros(8).bfloat16(), 1e-5)
    with pytest.raises(RuntimeError, match="grad_y"):
        OPERATORS["layer_norm_backward"].overloads["default"](torch.zeros(1, 8), torch.zeros(2, 8), None, 1e-5, True)


def test_module_is_a_drop_in_for_torch():
    x = torch.randn(4, 24)
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        theirs, ours = torch.nn.LayerNorm(24, eps=1e-6, **options), LayerNorm(24, eps=1e-6, **options)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(ValueError, match="needs a last dimension of 24"):
        ours(x[:, 1:])
