"""rms_norm on the devices of this machine: CPU at every instruction set; Triton and CUDA C++ where there is a GPU."""

import pytest
import torch

from dreamkernels import rms_norm
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.rms_norm import SHAPES, inputs, reference, trials

GPU = [
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def run(x, weight, residual=None, implementation="auto"):
    return rms_norm(x, weight, 1e-6, residual, implementation)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, residual, dtype, shape):
    with using_cpu_isa(isa):
        assert_close_to_float64(run, reference, lambda: inputs(shape, dtype, residual=residual), trials(shape))


@pytest.mark.parametrize("implementation", GPU)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 20000)], ids=str)
def test_gpu_is_as_exact_as_eager(implementation, residual, dtype, shape):
    if implementation == "cuda" and shape[-1] * (1 if shape[-1] % 8 else 0) > 4096:
        pytest.skip("the CUDA C++ kernel holds a row in registers")

    def chosen(x, weight, residual=None):
        return run(x, weight, residual, implementation)

    assert_close_to_float64(chosen, reference, lambda: inputs(shape, dtype, "cuda", residual), trials(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_rows_and_many_rows(dtype):
    assert_close_to_float64(run, reference, lambda: inputs((1500, 1024), dtype))
    assert_close_to_float64(run, reference, lambda: inputs((3, 20000), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_small_and_large_magnitudes(dtype):
    for scale in (1e-3, 50.0):
        assert_close_to_float64(run, reference, lambda scale=scale: inputs((50, 100), dtype, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_infinity_and_nan_propagate_as_in_eager(isa, dtype):
    x, weight = (t.detach() for t in inputs((4, 37), dtype))
    x[0, 3], x[1, 36], x[2, 5] = torch.inf, torch.nan, 0.0
    x[3] = 0.0
    with using_cpu_isa(isa):
        torch.testing.assert_close(run(x, weight), reference(x, weight), equal_nan=True, rtol=2e-2, atol=0)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_conversion_rounds_every_value_as_torch_does(isa, dtype):
    """A residual add of zero is a round trip through float32: all 65,536 bit patterns, and sums that are ties.

    Except that the bfloat16 instructions of the processor take denormals for zero.
    """
    native = isa == "avx512bf16" and dtype == torch.bfloat16

    def expected(exact):
        return torch.where(exact.abs() < torch.finfo(dtype).tiny, 0, exact) if native else exact

    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)
    finite = torch.where(bits.isfinite(), bits, torch.zeros((), dtype=dtype))
    other = finite.flip(0) * torch.tensor(0.5, dtype=dtype)
    weight = torch.ones(1024, dtype=dtype)
    with using_cpu_isa(isa):
        _, same = rms_norm(bits, weight, residual=torch.zeros_like(bits))
        _, added = rms_norm(finite, weight, residual=other)
    torch.testing.assert_close(same, expected(bits + 0), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(added, expected(finite + other), rtol=0, atol=0, equal_nan=True)


def test_strided_inputs_give_the_result_of_contiguous_ones():
    x, weight, residual = inputs((6, 10, 48), torch.bfloat16, residual=True)
    strided = [x.transpose(0, 1), weight, residual.transpose(0, 1)]
    assert not strided[0].is_contiguous()
    assert_close_to_float64(run, reference, lambda: strided)
    assert run(x[:, ::2], weight).is_contiguous()
    wide = torch.randn(96, dtype=torch.bfloat16)[::2]
    assert torch.equal(run(x, wide), run(x, wide.contiguous()))


def test_misaligned_view():
    storage = torch.randn(5 * 33 + 1)
    x, weight = storage[1:].view(5, 33), torch.randn(34)[1:]
    assert torch.equal(run(x, weight), run(x.clone(), weight.clone()))


def test_only_needed_gradients_are_made():
    x, weight = inputs((5, 24), torch.float32)
    frozen = weight.detach()
    run(x, frozen).sum().backward()
    assert x.grad is not None
    assert frozen.grad is None
    grad_x, grad_weight = OPERATORS["rms_norm_backward"].overloads["default"](
        torch.ones(5, 24), None, x.detach(), frozen, 1e-6, False
    )
    assert torch.equal(grad_x, x.grad)
    assert grad_weight.numel() == 0


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck_against_finite_differences():
    """float32 with a coarse step; the tolerance is that of the differences, not of the kernel."""
    x, weight = inputs((3, 9), torch.float32)
    assert torch.autograd.gradcheck(run, (x, weight), eps=1e-2, atol=2e-3, rtol=2e-2)


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    x, weight, residual = inputs((700, 333), torch.bfloat16, residual=True)
    gradient = torch.randn_like(x)

    def everything():
        y, h = run(x, weight, residual)
        return [y, h, *torch.autograd.grad([y, h], [x, weight, residual], [gradient, gradient])]

    assert_repeats_bitwise(everything)


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    x, weight = inputs((5, 100), torch.bfloat16)
    with torch.no_grad():
        light = run(x, weight)
    assert not light.requires_grad
    assert torch.equal(light, run(x, weight))
    with torch.inference_mode():
        assert torch.equal(run(x, weight), light)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    x, weight, residual = inputs((3, 40), dtype, residual=True)
    check_operator(
        OPERATORS["rms_norm"].overloads["default"],
        [(x, weight, 1e-6), (x.transpose(0, 1).detach()[:40, :3], weight.detach()[:3], 1e-6)],
    )
    check_operator(OPERATORS["add_rms_norm"].overloads["default"], [(x, residual, weight, 1e-6)])
    plain = [t.detach() for t in (x, weight, residual)]
    check_operator(OPERATORS["rms_norm"].overloads["inference"], [(plain[0], plain[1], 1e-6)])
    check_operator(OPERATORS["add_rms_norm"].overloads["inference"], [(plain[0], plain[2], plain[1], 1e-6)])
    check_operator(
        OPERATORS["rms_norm_backward"].overloads["default"],
        [
            (plain[2], plain[2], plain[0], plain[1], 1e-6, True),
            (plain[2], None, plain[0], plain[1], 1e-6, False),
        ],
    )


def test_compiles_once_with_gradients_and_dynamic_rows():
    calls = [inputs((rows, 64), torch.bfloat16, residual=True) for rows in (8, 24, 40)]
    assert_compiles_once(run, calls[:1] * 2)
    assert_compiles_once(run, calls, backend="aot_eager", dynamic=True)

    x, weight, residual = calls[0]
    compiled = torch.compile(run, fullgraph=True)
    expected = torch.autograd.grad([o.float().sum() for o in run(x, weight, residual)], [x, weight, residual])
    found = torch.autograd.grad([o.float().sum() for o in compiled(x, weight, residual)], [x, weight, residual])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "does not support"),
        ({"weight": torch.zeros(8, dtype=torch.bfloat16)}, "weight has dtype"),
        ({"weight": torch.zeros(7)}, r"needs a weight \[8\], not \[7\]"),
        ({"weight": torch.zeros(8, 1)}, r"needs a weight \[8\]"),
        ({"x": torch.zeros(())}, "needs a weight"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta"),
        ({"residual": torch.zeros(3, 8)}, "residual .* must have the shape"),
        ({"residual": torch.zeros(2, 8, dtype=torch.float16)}, "residual .* must have the shape"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "cuda"}, "cannot run on cpu"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), **change}
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    operator = OPERATORS["rms_norm"].overloads["default"]
    with pytest.raises(RuntimeError, match="needs a weight"):
        operator(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(RuntimeError, match="same dtype"):
        operator(torch.zeros(2, 8), torch.zeros(8, dtype=torch.bfloat16), 1e-6)
    with pytest.raises(RuntimeError, match="residual"):
        OPERATORS["add_rms_norm"].overloads["default"](torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(8), 1e-6)
