"""Memory-bound Triton kernels read and write every element of their large tensors once: the declared minimum."""

import pytest
import torch

from dreamkernels import (
    add_noise,
    diffusion_loss,
    guided_step,
    rms_norm,
    rotary,
    rotary_tables,
    splice_embeddings,
    swiglu,
)
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing.interpreter import install
from dreamkernels.testing.traffic import count_traffic
from tests.support import diffusion_loss as loss_support
from tests.support import guided_step as step_support

WIDTH = 300
install()


def backward_of(operator):
    return OPERATORS[f"{operator}_backward"].overloads["triton"]


def assert_once(traffic, read, written):
    for name, tensor in read.items():
        assert traffic.reads(tensor) == 1.0, name
    for name, tensor in written.items():
        assert traffic.writes(tensor) == 1.0, name
    for name, tensor in read.items():
        assert traffic.writes(tensor) == 0.0, name
    for name, tensor in written.items():
        assert traffic.reads(tensor) == 0.0, name


def test_counting_sees_every_access():
    """The tool itself: a row wider than a program holds is read twice, which is what the kernel for wide rows does."""
    x, weight = torch.randn(2, 20000), torch.rand(20000)
    with count_traffic() as traffic:
        y = rms_norm(x, weight, 1e-6, implementation="triton")
    assert (traffic.reads(x), traffic.writes(y), traffic.reads(weight)) == (2.0, 1.0, 2.0)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_rms_norm(residual):
    x, weight, added = torch.randn(10, WIDTH), torch.rand(WIDTH), torch.randn(10, WIDTH)
    with count_traffic() as traffic:
        if residual:
            y, h = rms_norm(x, weight, 1e-6, added, implementation="triton")
            assert_once(traffic, {"x": x, "residual": added}, {"y": y, "h": h})
        else:
            y = rms_norm(x, weight, 1e-6, implementation="triton")
            assert_once(traffic, {"x": x}, {"y": y})
    gradient = torch.randn(10, WIDTH)
    with count_traffic() as traffic:
        grad_x, _ = backward_of("rms_norm")(gradient, added if residual else None, x, weight, 1e-6, True)
    read = {"x": x, "grad_y": gradient} | ({"grad_residual": added} if residual else {})
    assert_once(traffic, read, {"grad_x": grad_x})


def test_splice_embeddings():
    tokens, features = torch.randn(40, WIDTH), torch.randn(10, WIDTH)
    index = torch.full((40,), -1)
    index[5:15] = torch.arange(10)
    with count_traffic() as traffic:
        out = splice_embeddings(tokens, [features], index, implementation="triton")
    assert_once(traffic, {"features": features}, {"out": out})
    assert traffic.reads(tokens) == 30 / 40  # rows that are replaced are not read


def test_rotary():
    cos, sin = rotary_tables(20, 32)
    q, k = torch.randn(12, 4, 32), torch.randn(12, 2, 32)
    positions = torch.arange(12)
    with count_traffic() as traffic:
        rotated_q, rotated_k = rotary(q, k, cos, sin, positions, implementation="triton")
    assert_once(traffic, {"q": q, "k": k}, {"rotated q": rotated_q, "rotated k": rotated_k})


def test_swiglu():
    gate, up, gradient = torch.randn(3, 6, WIDTH)
    with count_traffic() as traffic:
        y = swiglu(gate, up, implementation="triton")
    assert_once(traffic, {"gate": gate, "up": up}, {"y": y})
    with count_traffic() as traffic:
        grad_gate, grad_up = backward_of("swiglu")(gradient, gate, up)
    read = {"gate": gate, "up": up, "grad_y": gradient}
    assert_once(traffic, read, {"grad_gate": grad_gate, "grad_up": grad_up})


@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_guided_step(rescale):
    schedule = step_support.random_schedule()
    latents, prediction, noise, history = step_support.inputs((2, 3000), step_support.DTYPES[0])
    with count_traffic() as traffic:
        y, x0 = guided_step(latents, prediction, schedule, 1, 2.0, rescale, noise, history, "triton")
    assert_once(traffic, {"latents": latents, "noise": noise, "history": history}, {"y": y, "x0": x0})
    assert traffic.reads(prediction) == (2.0 if rescale else 1.0)  # the deviation has to be known before the update
    with count_traffic() as traffic:
        guided_step(latents, prediction, schedule, 0, 2.0, 0.0, noise, history, "triton")
    assert traffic.reads(noise) == traffic.reads(history) == 0.0  # without weight at this step


@pytest.mark.parametrize("target", range(3), ids=loss_support.PREDICTION_TYPES)
def test_diffusion_loss(target):
    prediction, latents, noise, timesteps, table = loss_support.inputs((2, 3000), loss_support.DTYPES[0])
    prediction = prediction.detach()
    read = (
        {"prediction": prediction} | ({"noise": noise} if target < 2 else {}) | ({"latents": latents} if target else {})
    )
    with count_traffic() as traffic:
        diffusion_loss(
            prediction, latents, noise, timesteps, table, loss_support.PREDICTION_TYPES[target], implementation="triton"
        )
    assert_once(traffic, read, {})
    assert traffic.reads(latents) + traffic.reads(noise) == len(read) - 1
    with count_traffic() as traffic:
        arguments = (prediction, latents, noise, timesteps, table, target, None, True)
        grad = backward_of("diffusion_loss")(torch.ones(()), *arguments)
    assert_once(traffic, read, {"grad": grad})


def test_add_noise():
    _, latents, noise, timesteps, table = loss_support.inputs((2, 3000), loss_support.DTYPES[0])
    with count_traffic() as traffic:
        noisy = add_noise(latents, noise, timesteps, table, implementation="triton")
    assert_once(traffic, {"latents": latents, "noise": noise}, {"noisy": noisy})
