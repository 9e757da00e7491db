"""add_noise and diffusion_loss: CPU at every instruction set; Triton where there is a GPU; equal to diffusers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from dreamkernels import add_noise, diffusion_loss
from dreamkernels.ops.debug import debug_checks
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.diffusion_loss import (
    DTYPES,
    PREDICTION_TYPES,
    SHAPES,
    alphas_cumprod,
    compare_loss,
    compare_noise,
    inputs,
    type_names,
)
from tests.support.synchronisation import assert_never_waits


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtypes", DTYPES, ids=type_names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtypes, shape):
    with using_cpu_isa(isa):
        compare_noise(shape, dtypes)
        for settings in (("epsilon", None, "mean"), ("v_prediction", 5.0, "none"), ("sample", 5.0, "mean")):
            compare_loss(shape, dtypes, settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=type_names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_is_as_exact_as_eager(dtypes, shape):
    compare_noise(shape, dtypes, "cuda", "triton")
    for settings in (("epsilon", None, "mean"), ("v_prediction", 5.0, "none"), ("sample", 5.0, "mean")):
        compare_loss(shape, dtypes, settings, "cuda", "triton")


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_equals_diffusers(prediction_type, gamma):
    """add_noise, get_velocity, compute_snr and F.mse_loss, in float64."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    table = scheduler.alphas_cumprod.clone()
    prediction, latents, noise, timesteps, _ = inputs((5, 4, 16, 16), DTYPES[0], requires_grad=False)
    scheduler.alphas_cumprod = table.double()
    wide = latents.double(), noise.double(), timesteps
    torch.testing.assert_close(
        add_noise(latents, noise, timesteps, table).double(), scheduler.add_noise(*wide), rtol=1e-6, atol=1e-6
    )
    target = {"epsilon": wide[1], "v_prediction": scheduler.get_velocity(*wide), "sample": wide[0]}[prediction_type]
    error = F.mse_loss(prediction.double(), target, reduction="none").mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        error = error * snr.clamp(max=gamma) / divisor
    for reduction, wanted in (("none", error), ("mean", error.mean())):
        found = diffusion_loss(prediction, latents, noise, timesteps, table, prediction_type, gamma, reduction)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_weights_at_the_ends_of_the_schedule(prediction_type, implementation):
    """A signal-to-noise ratio of zero and of infinity; sample at infinity is bounded by gamma."""
    table = torch.tensor([1.0, 0.5, 0.0])
    prediction, latents, noise = torch.ones(3, 8), torch.zeros(3, 8), torch.zeros(3, 8)
    found = diffusion_loss(
        prediction, latents, noise, torch.arange(3), table, prediction_type, 0.5, "none", implementation
    )
    wanted = {"epsilon": [0.0, 0.5, 1.0], "v_prediction": [0.0, 0.25, 0.0], "sample": [0.5, 0.5, 0.0]}
    assert found.tolist() == wanted[prediction_type]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
def test_nothing_has_no_mean(shape):
    prediction, latents, noise, timesteps, table = inputs(shape, DTYPES[0])
    assert add_noise(latents, noise, timesteps, table).shape == shape
    loss = diffusion_loss(prediction, latents, noise, timesteps, table)
    assert loss.isnan()
    assert torch.autograd.grad(loss, prediction)[0].shape == shape
    assert diffusion_loss(prediction, latents, noise, timesteps, table, reduction="none").shape == shape[:1]


def test_backward_saves_its_inputs_only():
    saved = []
    tensors = inputs((3, 4, 8, 8), DTYPES[1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        loss = diffusion_loss(*tensors, "v_prediction", 5.0)
    assert loss.requires_grad
    assert saved == [t.data_ptr() for t in tensors]


def test_views_give_the_result_of_copies():
    prediction, latents, noise, timesteps, table = inputs((3, 4, 8, 8), DTYPES[0])
    views = [x.detach().contiguous(memory_format=torch.channels_last) for x in (prediction, latents, noise)]
    views += [torch.stack([timesteps] * 2, 1)[:, 0], torch.stack([table] * 2, 1)[:, 0]]
    views[0].requires_grad_()
    assert torch.equal(add_noise(*views[1:]), add_noise(latents, noise, timesteps, table))
    found = diffusion_loss(*views, "v_prediction", 5.0)
    wanted = diffusion_loss(prediction, latents, noise, timesteps, table, "v_prediction", 5.0)
    assert torch.equal(found, wanted)
    (gradient,) = torch.autograd.grad(found, views[0])
    assert torch.equal(gradient, torch.autograd.grad(wanted, prediction)[0])


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    tensors = inputs((5, 4, 100, 100), DTYPES[1])

    def everything():
        loss = diffusion_loss(*tensors, "v_prediction", 5.0)
        return [loss.reshape(1), add_noise(*tensors[1:]), *torch.autograd.grad(loss, tensors[0])]

    assert_repeats_bitwise(everything)


def test_the_host_never_waits():
    tensors = inputs((2, 4, 8, 8), DTYPES[1])
    with assert_never_waits():
        add_noise(*tensors[1:], torch.bfloat16)
        diffusion_loss(*tensors, "v_prediction", 5.0).backward()


def test_registration():
    for dtypes in (DTYPES[1], DTYPES[3]):
        prediction, latents, noise, timesteps, table = inputs((2, 4, 5, 5), dtypes)
        plain = prediction.detach()
        rest = (latents, noise, timesteps, table)
        check_operator(OPERATORS["add_noise"].overloads["default"], [(*rest, dtypes[1])])
        check_operator(OPERATORS["diffusion_loss"].overloads["default"], [(prediction, *rest, 1, 5.0, True)])
        check_operator(
            OPERATORS["diffusion_loss"].overloads["inference"],
            [
                (plain, *rest, 0, None, False),
                (plain.transpose(1, 2), *(x.transpose(1, 2) for x in rest[:2]), *rest[2:], 2, None, True),
            ],
        )
        check_operator(
            OPERATORS["diffusion_loss_backward"].overloads["default"],
            [(torch.ones(()), plain, *rest, 1, 5.0, True), (torch.ones(2), plain, *rest, 0, None, False)],
        )


def test_compiles_once():
    calls = [inputs((batch, 4, 8, 8), DTYPES[1]) for batch in (2, 3, 4)]

    def step(prediction, latents, noise, timesteps, table):
        noisy = add_noise(latents, noise, timesteps, table, torch.bfloat16)
        return diffusion_loss(prediction + noisy, latents, noise, timesteps, table, "v_prediction", 5.0)

    assert_compiles_once(step, calls[:1] * 2)
    assert_compiles_once(step, calls, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(2, 4, dtype=torch.float64)}, "prediction has dtype torch.float64"),
        ({"latents": torch.zeros(2, 5)}, r"latents \[2, 5\] on cpu must be \[2, 4\] on cpu"),
        ({"noise": torch.zeros(2, 4, device="meta")}, "noise .* on meta must be"),
        ({"noise": torch.zeros(2, 4).half()}, "noise has dtype torch.float16; it must be float32 or torch.float32"),
        (
            {"prediction": torch.zeros(2, 4).half(), "noise": torch.zeros(2, 4).half()},
            "latents torch.float32; they must",
        ),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, r"timesteps \[3\] .* must be int64 \[2\]"),
        ({"timesteps": torch.zeros(2)}, "timesteps .* must be int64"),
        ({"alphas_cumprod": torch.ones(0)}, r"alphas_cumprod \[0\] .* must be float32 \[T\]"),
        ({"alphas_cumprod": torch.ones(9).double()}, "alphas_cumprod .* must be float32"),
        ({"prediction_type": "flow"}, "prediction_type 'flow' is unknown .epsilon, v_prediction, sample"),
        ({"reduction": "sum"}, "reduction 'sum' is unknown .mean, none"),
        ({"snr_gamma": 0.0}, "snr_gamma must be a positive number or None, not 0.0"),
        ({"latents": torch.zeros(2, 4, requires_grad=True)}, "records no gradient of latents and noise"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "prediction": torch.zeros(2, 4),
        "latents": torch.zeros(2, 4),
        "noise": torch.zeros(2, 4),
        "timesteps": torch.zeros(2, dtype=torch.int64),
        "alphas_cumprod": alphas_cumprod(),
    }
    with pytest.raises(ValueError, match=message):
        diffusion_loss(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "add_noise: dtype torch.float64 is not supported"),
        (
            {"latents": torch.zeros(2, 4).half()},
            "noise has dtype torch.float32; it must be|noise has dtype torch.float32, latents",
        ),
        ({"latents": torch.zeros(2, 4).half(), "dtype": torch.float32}, "noise has dtype|latents has dtype"),
        ({"noise": torch.zeros(4)}, r"add_noise: noise \[4\]"),
        ({"latents": torch.zeros(()), "noise": torch.zeros(())}, "add_noise: latents need a batch dimension"),
        ({"noise": torch.zeros(2, 4, requires_grad=True)}, "add_noise records no gradient"),
    ],
)
def test_bad_arguments_of_add_noise_are_named(change, message):
    arguments = {
        "latents": torch.zeros(2, 4),
        "noise": torch.zeros(2, 4),
        "timesteps": torch.zeros(2, dtype=torch.int64),
        "alphas_cumprod": alphas_cumprod(),
    }
    with pytest.raises(ValueError, match=message):
        add_noise(**arguments | change)


@pytest.mark.parametrize("bad", [-1, 1000])
def test_a_timestep_out_of_range_raises(bad):
    x, timesteps = torch.zeros(3, 4), torch.tensor([5, bad, 7])
    for call in (
        lambda: add_noise(x, x, timesteps, alphas_cumprod()),
        lambda: diffusion_loss(x, x, x, timesteps, alphas_cumprod()),
    ):
        with pytest.raises(
            RuntimeError, match=rf"timesteps\[1\] = {bad} is out of range: the schedule has the steps 0 to 999"
        ):
            call()
        with debug_checks(), pytest.raises(ValueError, match=rf"timesteps\[1\] = {bad} is out of range"):
            call()


def test_the_operators_themselves_refuse_what_would_read_out_of_bounds():
    x, t, table = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), alphas_cumprod()
    for name, arguments, message in (
        ("add_noise", (x, x[:1], t, table, torch.float32), "noise"),
        ("add_noise", (x.half(), x.half(), t, table, torch.float32), "latents must be float32"),
        ("add_noise", (x, x, t[:1], table, torch.float32), "timesteps"),
        ("add_noise", (x, x, t.int(), table, torch.float32), "timesteps"),
        ("add_noise", (x, x, t, table.double(), torch.float32), "alphas_cumprod"),
        ("diffusion_loss", (x, x[:1], x, t, table, 0, None, True), "latents"),
        ("diffusion_loss", (x, x, x.half(), t, table, 0, None, True), "dtype of latents"),
        ("diffusion_loss", (x, x, x, t, table, 3, None, True), "target 3"),
        ("diffusion_loss_backward", (torch.ones(3), x, x, x, t, table, 0, None, False), "shape of the loss"),
        ("diffusion_loss_backward", (torch.ones(2), x, x, x, t, table, 0, None, True), "shape of the loss"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS[name].overloads["default"](*arguments)
