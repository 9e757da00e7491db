"""The Triton kernels of add_noise and diffusion_loss, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import add_noise, diffusion_loss
from dreamkernels.ops.diffusion_loss import triton as kernels
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.diffusion_loss import (
    DTYPES,
    PREDICTION_TYPES,
    alphas_cumprod,
    compare_loss,
    compare_noise,
    inputs,
    type_names,
)

SHAPES = ((1, 1), (3, 7), (2, 4, 5, 5), (1, 3000))


@pytest.mark.parametrize("dtypes", DTYPES, ids=type_names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(dtypes, shape):
    repeats = {(1, 3000): 8, (2, 4, 5, 5): 24}.get(
        shape, 48
    )  # a sample's weight is rounded once, by luck well or badly
    compare_noise(shape, dtypes, implementation="triton", repeats=repeats)
    for settings in (("epsilon", None, "mean"), ("v_prediction", 5.0, "none"), ("sample", 5.0, "mean")):
        compare_loss(shape, dtypes, settings, implementation="triton", repeats=repeats)


def test_more_elements_than_one_block_per_chunk(monkeypatch):
    """105 chunks of three blocks each."""
    monkeypatch.setattr(kernels, "launch_parameters", lambda *arguments: {"block_columns": 16, "num_warps": 1})
    settings = ("epsilon", None, "mean")
    compare_loss((1, 5000), DTYPES[0], settings, implementation="triton", repeats=8)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_weights_at_the_ends_of_the_schedule(prediction_type):
    tensors = torch.ones(3, 8), torch.zeros(3, 8), torch.zeros(3, 8), torch.arange(3), torch.tensor([1.0, 0.5, 0.0])
    found = diffusion_loss(*tensors, prediction_type, 0.5, "none", "triton")
    assert torch.equal(found, diffusion_loss(*tensors, prediction_type, 0.5, "none"))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_nothing_has_no_mean(shape):
    prediction, *rest = inputs(shape, DTYPES[0])
    loss = diffusion_loss(prediction, *rest, implementation="triton")
    assert loss.isnan()
    assert torch.autograd.grad(loss, prediction)[0].shape == shape
    assert add_noise(*rest, implementation="triton").shape == shape


def test_a_timestep_out_of_range_is_taken_to_the_nearest():
    x, e, table = torch.randn(2, 8), torch.randn(2, 8), alphas_cumprod()
    found = add_noise(x, e, torch.tensor([-3, 1007]), table, implementation="triton")
    assert torch.equal(found, add_noise(x, e, torch.tensor([0, 999]), table, implementation="triton"))


def test_registration_and_compilation():
    prediction, *rest = inputs((2, 4, 5, 5), DTYPES[1])
    plain = prediction.detach()
    check_operator(OPERATORS["add_noise"].overloads["triton"], [(*rest, torch.bfloat16)])
    check_operator(OPERATORS["diffusion_loss"].overloads["triton"], [(prediction, *rest, 1, 5.0, True)])
    backward = OPERATORS["diffusion_loss_backward"].overloads["triton"]
    check_operator(
        backward, [(torch.ones(()), plain, *rest, 1, 5.0, True), (torch.ones(2), plain, *rest, 0, None, False)]
    )

    def run(*tensors):
        return diffusion_loss(*tensors, "v_prediction", 5.0, implementation="triton")

    assert_compiles_once(run, [(prediction, *rest)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    tensors = inputs((2, 4, 30, 30), DTYPES[1])

    def everything():
        loss = diffusion_loss(*tensors, "v_prediction", 5.0, implementation="triton")
        return [loss.reshape(1), *torch.autograd.grad(loss, tensors[0])]

    assert_repeats_bitwise(everything, repeats=2)
