"""The Triton kernels of rms_norm, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import devices, rms_norm
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.rms_norm import inputs, reference, trials

# One program per block of rows costs about a millisecond here: few rows, all branches. 20000 takes the kernels for
# wide rows.
SHAPES = ((0, 8), (3, 1), (9, 7), (2, 3, 130), (5, 1030), (230, 4), (2, 20000))


def run(x, weight, residual=None):
    return rms_norm(x, weight, 1e-6, residual, "triton")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(shape, dtype, residual):
    assert_close_to_float64(run, reference, lambda: inputs(shape, dtype, residual=residual), min(8, trials(shape)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_agrees_with_the_compiled_cpu_kernel_to_the_last_rounding(dtype):
    x, weight, residual = (t.detach() for t in inputs((6, 200), dtype, residual=True))
    (y, h), (compiled, compiled_h) = run(x, weight, residual), rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(h, compiled_h)
    ulp = torch.finfo(dtype).eps * compiled.abs().float()
    assert ((y.float() - compiled.float()).abs() <= ulp).all()


def test_weight_gradient_is_left_out_when_not_needed():
    x, weight = inputs((5, 24), torch.float32)
    run(x, weight.detach()).sum().backward()
    expected = torch.autograd.grad(reference(x, weight).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_strided_inputs():
    x, weight, residual = inputs((6, 4, 48), torch.bfloat16, residual=True)
    assert_close_to_float64(run, reference, lambda: [x.transpose(0, 1), weight, residual.transpose(0, 1)])


def test_registration_and_compilation():
    x, weight, residual = inputs((3, 40), torch.bfloat16, residual=True)
    check_operator(OPERATORS["rms_norm"].overloads["triton"], [(x, weight, 1e-6)])
    check_operator(OPERATORS["add_rms_norm"].overloads["triton"], [(x, residual, weight, 1e-6)])
    plain = [t.detach() for t in (x, weight)]
    check_operator(OPERATORS["rms_norm_backward"].overloads["triton"], [(plain[0], None, *plain, 1e-6, True)])
    assert_compiles_once(run, [(x, weight, residual)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    x, weight = inputs((40, 33), torch.bfloat16)
    gradient = torch.randn_like(x)
    assert_repeats_bitwise(lambda: torch.autograd.grad(run(x, weight), [x, weight], gradient), repeats=2)


def test_an_unsupported_width_names_the_limit(monkeypatch):
    table = {"rms_norm_forward": [{"max_width": 64, "rows_per_program": 1, "num_warps": 4}]}
    tiny = devices.Device("sm_80", "", {}, "", table, "")
    monkeypatch.setattr("dreamkernels.devices.loader.load_device", lambda architecture: tiny)
    with pytest.raises(ValueError, match=r"width 65 is not supported by rms_norm_forward on sm_80 \(at most 64\)"):
        devices.launch_parameters.__wrapped__("sm_80", "rms_norm_forward", 65)
