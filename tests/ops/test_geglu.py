"""geglu on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import pytest
import torch

from dreamkernels import geglu
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.geglu import SHAPES, inputs, reference, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, shape):
    with using_cpu_isa(isa):
        assert_close_to_float64(geglu, reference, lambda: inputs(shape, dtype), trials(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 2560)], ids=str)
def test_gpu_is_as_exact_as_eager(dtype, shape):
    assert_close_to_float64(geglu, reference, lambda: inputs(shape, dtype, "cuda"), trials(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_small_and_large_magnitudes(dtype):
    for scale in (1e-3, 8.0):
        assert_close_to_float64(geglu, reference, lambda scale=scale: inputs((50, 200), dtype, scale=scale))


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_the_negative_tail_keeps_its_relative_precision(isa):
    """Where 1 + erf cancels, and eager returns a multiple of 2^-24."""
    gate = torch.linspace(-9, -3, 1000)
    exact = gate.double() * torch.special.erfc(-gate.double() / 2**0.5) / 2
    with using_cpu_isa(isa):
        y = geglu(torch.cat([torch.ones(1000), gate]))
    torch.testing.assert_close(y.double(), exact, rtol=60 * 2**-24, atol=0)


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_infinity_and_nan_propagate(isa):
    """As h g Phi(g) has it; PyTorch's GELU of infinity is NaN."""
    hidden = torch.tensor([1.0, -2.0, 1.0, torch.nan, 1.0, torch.inf, 0.0])
    gate = torch.tensor([torch.inf, torch.inf, torch.nan, 1.0, -50.0, 2.0, torch.inf])
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.nan, -0.0, torch.inf, torch.nan])
    with using_cpu_isa(isa):
        torch.testing.assert_close(geglu(torch.cat([hidden, gate])), expected, equal_nan=True)


def test_strided_inputs_give_the_result_of_contiguous_ones():
    x = torch.randn(48, 6, 10).permute(1, 2, 0).bfloat16().requires_grad_()
    assert not x.is_contiguous()
    assert_close_to_float64(geglu, reference, lambda: [x])
    assert geglu(x).is_contiguous()
    gradient = torch.randn(24, 6, 10).permute(1, 2, 0).bfloat16()
    (strided,) = torch.autograd.grad(geglu(x), x, gradient)
    (plain,) = torch.autograd.grad(geglu(x), x, gradient.contiguous())
    assert torch.equal(strided, plain)


def test_misaligned_view():
    x = torch.randn(5 * 34 + 1)[1:].view(5, 34)
    assert torch.equal(geglu(x), geglu(x.clone()))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck_against_finite_differences():
    """float32 with a coarse step; the tolerance is that of the differences, not of the kernel."""
    assert torch.autograd.gradcheck(geglu, inputs((3, 10), torch.float32, scale=0.7), eps=1e-2, atol=2e-3, rtol=2e-2)


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    (x,) = inputs((700, 334), torch.bfloat16)
    gradient = torch.randn(700, 167).bfloat16()
    assert_repeats_bitwise(lambda: [geglu(x), *torch.autograd.grad(geglu(x), x, gradient)])


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    (x,) = inputs((5, 100), torch.bfloat16)
    with torch.no_grad():
        light = geglu(x)
    assert not light.requires_grad
    assert torch.equal(light, geglu(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    (x,) = inputs((3, 40), dtype)
    plain = x.detach()
    strided = torch.randn(40, 3).to(dtype).t().requires_grad_()
    check_operator(OPERATORS["geglu"].overloads["default"], [(x,), (strided,)])
    check_operator(OPERATORS["geglu"].overloads["inference"], [(plain,)])
    check_operator(OPERATORS["geglu_backward"].overloads["default"], [(plain[:, :20], plain)])


def test_compiles_once_with_gradients_and_dynamic_rows():
    calls = [inputs((rows, 64), torch.bfloat16) for rows in (8, 24, 40)]
    assert_compiles_once(geglu, calls[:1] * 2)
    assert_compiles_once(geglu, calls, backend="aot_eager", dynamic=True)
    (x,) = calls[0]
    compiled = torch.compile(geglu, fullgraph=True)
    (expected,) = torch.autograd.grad(geglu(x).float().sum(), x)
    (found,) = torch.autograd.grad(compiled(x).float().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("x", "implementation", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "auto", "does not support"),
        (torch.zeros(2, 7), "auto", r"x \[2, 7\] must hold the hidden half and the gate half"),
        (torch.zeros(()), "auto", "must hold the hidden half"),
        (torch.zeros(2, 8), "fast", "unknown"),
        (torch.zeros(2, 8), "triton", "cannot run on cpu"),
        (torch.zeros(2, 8), "cuda", "no CUDA C"),
    ],
)
def test_bad_arguments_are_named(x, implementation, message):
    with pytest.raises(ValueError, match=message):
        geglu(x, implementation)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    with pytest.raises(RuntimeError, match="even last dimension"):
        OPERATORS["geglu"].overloads["default"](torch.zeros(2, 7))
    backward = OPERATORS["geglu_backward"].overloads["default"]
    with pytest.raises(RuntimeError, match="half the columns"):
        backward(torch.zeros(1, 4), torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="dtype"):
        backward(torch.zeros(2, 4).bfloat16(), torch.zeros(2, 8))


def test_module_is_a_drop_in_for_diffusers():
    from dreamkernels.nn import GEGLU

    activations = pytest.importorskip("diffusers.models.activations")
    for bias in (True, False):
        theirs, ours = activations.GEGLU(12, 20, bias=bias), GEGLU(12, 20, bias=bias)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 5, 12)
        torch.testing.assert_close(ours(x), theirs(x))
