"""guided_step: equal to diffusers' schedulers step by step, at every instruction set; Triton where there is a GPU."""

import dataclasses
from unittest import mock

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from dreamkernels import UnsupportedScheduler, guided_step, step_schedule
from dreamkernels.ops.debug import debug_checks
from dreamkernels.ops.guided_step import reference
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    assert_within_eager_error,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.guided_step import (
    DTYPES,
    SCHEDULERS,
    SHAPES,
    STABLE_DIFFUSION,
    compare,
    inputs,
    random_schedule,
    ready,
    run_trajectory,
    type_names,
)
from tests.support.synchronisation import assert_never_waits


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_equals_diffusers(name):
    schedule, found = run_trajectory(name)
    assert len(schedule) == len(found)
    for step, (ours, theirs, exact) in enumerate(found):
        assert_within_eager_error(ours, theirs, exact, what=f"step {step}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_equals_diffusers_on_the_gpu(name):
    for step, (ours, theirs, exact) in enumerate(run_trajectory(name, "cuda", "triton")[1]):
        assert_within_eager_error(ours, theirs, exact, what=f"step {step}")


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtypes", DTYPES, ids=type_names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtypes, shape):
    rescale = 0.7 if torch.Size(shape[1:]).numel() > 1 else 0.0  # one element has no deviation
    with using_cpu_isa(isa):
        compare(shape, dtypes, guided=False)
        compare(shape, dtypes, guided=True)
        compare(shape, dtypes, True, True, rescale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=type_names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_is_as_exact_as_eager(dtypes, shape):
    rescale = 0.7 if torch.Size(shape[1:]).numel() > 1 else 0.0
    compare(shape, dtypes, False, False, 0.0, "cuda", "triton")
    compare(shape, dtypes, True, False, 0.0, "cuda", "triton")
    compare(shape, dtypes, True, True, rescale, "cuda", "triton")


def test_the_rescale_keeps_its_precision_far_from_zero():
    """One-pass formulas for the deviation cancel where the mean is large."""
    shape = (48, 4, 48, 48)  # many samples: the factor of each is rounded once, by luck well or badly
    prediction = 1000 + torch.randn(2 * shape[0], *shape[1:])
    schedule, latents = random_schedule(keeps_history=False), torch.zeros(shape)
    ours = guided_step(latents, prediction, schedule, 0, 3.0, 1.0)[0]
    table = schedule.table
    eager = reference.guided_step(latents, prediction, table, 0, 3.0, 1.0)[0]
    exact = reference.guided_step(latents.double(), prediction.double(), table.double(), 0, 3.0, 1.0)[0]
    assert_within_eager_error(ours, eager, exact)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_step_may_be_a_tensor(kind):
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((2, 4, 8, 8), DTYPES[0])
    at = torch.zeros((), dtype=kind)
    for step in range(len(schedule)):
        wanted = guided_step(latents, prediction, schedule, step, 2.0, 0.5, noise, history)
        found = guided_step(latents, prediction, schedule, at, 2.0, 0.5, noise, history)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        at += 1


def test_what_has_no_weight_is_not_read():
    """At the first step of a solver the history holds anything, even what is not a number."""
    schedule = random_schedule()
    latents, prediction, _, _ = inputs((2, 40), DTYPES[0])
    nothing = torch.full((2, 40), torch.nan)
    for at in (0, torch.zeros(1, dtype=torch.int64)):
        found = guided_step(latents, prediction, schedule, at, 2.0, 0.0, nothing, nothing)
        wanted = guided_step(latents, prediction, schedule, 0, 2.0)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    found = guided_step(latents, prediction, schedule, 0, 2.0, 0.0, nothing, nothing, implementation="reference")
    assert found[0].isfinite().all()


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_nan_and_infinity_are_not_clipped_away(isa):
    schedule = random_schedule(keeps_history=False)
    latents, prediction = torch.zeros(1, 20), torch.zeros(1, 20)
    latents[0, 3] = prediction[0, 18] = torch.nan
    with using_cpu_isa(isa):
        found = guided_step(latents, prediction, schedule, 0)[0]
    assert found.isnan().nonzero().tolist() == [[0, 3], [0, 18]]


def test_a_sample_does_not_depend_on_its_batch():
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((3, 4, 48, 48), DTYPES[1])
    scales = torch.tensor([1.5, 3.0, 7.5])
    together = guided_step(latents, prediction, schedule, 1, scales, 0.5, noise, history)
    for k in range(3):
        rows = slice(k, k + 1)
        both = torch.cat([prediction[rows], prediction[3 + k : 4 + k]])
        alone = guided_step(latents[rows], both, schedule, 1, float(scales[k]), 0.5, noise[rows], history[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


def test_views_give_the_result_of_copies():
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((3, 4, 8, 8), DTYPES[0])
    wanted = guided_step(latents, prediction, schedule, 2, torch.ones(3), 0.5, noise, history)
    views = [x.contiguous(memory_format=torch.channels_last) for x in (latents, prediction, noise, history)]
    views[2] = torch.cat([views[2], views[2]], 3)[..., :8]
    wide = dataclasses.replace(schedule, table=torch.cat([schedule.table, schedule.table], 1)[:, :8])
    found = guided_step(views[0], views[1], wide, 2, torch.ones(3, 2)[:, 0], 0.5, *views[2:])
    for a, b in zip(found, wanted, strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((5, 4, 100, 100), DTYPES[3])
    assert_repeats_bitwise(lambda: guided_step(latents, prediction, schedule, 1, 7.5, 0.7, noise, history))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_the_host_never_waits(implementation):
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((2, 4, 8, 8), DTYPES[0])
    at, scales = torch.ones((), dtype=torch.int64), torch.ones(2)
    with assert_never_waits():
        for step in (1, at):
            for scale in (7.5, scales):
                guided_step(latents, prediction, schedule, step, scale, 0.7, noise, history, implementation)


def test_the_watch_over_waiting_sees_it():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), assert_never_waits():
        float(torch.ones(1))


def test_registration():
    schedule = random_schedule()
    operator = OPERATORS["guided_step"].overloads["default"]
    for dtypes in (DTYPES[1], DTYPES[3]):
        latents, prediction, noise, history = inputs((2, 4, 5, 5), dtypes)
        plain = (latents, prediction[:2], schedule.table, 0, None, None, 1.0, 0.0, None, None, False)
        at = torch.ones((), dtype=torch.int64)
        full = (latents, prediction, schedule.table, 0, at, torch.ones(2), 1.0, 0.5, noise, history, True)
        strided = (latents.transpose(1, 2), prediction.transpose(1, 2), *full[2:8], None, None, True)
        check_operator(operator, [plain, full, strided])


def test_compiles_once():
    schedule = random_schedule()

    def run(latents, prediction, step, noise, history):
        return guided_step(latents, prediction, schedule, step, 7.5, 0.7, noise, history)

    calls = []
    for step in range(3):
        latents, prediction, noise, history = inputs((2, 4, 8, 8), DTYPES[1])
        calls.append((latents, prediction, torch.tensor(step), noise, history))
    assert_compiles_once(run, calls)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_schedule_knows_what_its_steps_need():
    ddpm, eta = ready("ddpm leading")
    schedule = step_schedule(ddpm, eta)
    assert (schedule.kind, schedule.timesteps, schedule.keeps_history) == (
        "ddpm",
        tuple(ddpm.timesteps.tolist()),
        False,
    )
    assert all(schedule.needs_noise)  # the last step, t = 1, adds noise of variance 1e-20
    assert schedule.new_history(torch.ones(2, 3)) is None
    assert not any(step_schedule(ready("ddim leading")[0]).needs_noise)
    noisy = step_schedule(*ready("ddim linspace eta"))
    assert noisy.needs_noise == (True,) * 6 + (False,)
    second = step_schedule(ready("dpm++ linspace")[0])
    assert (second.kind, second.keeps_history, any(second.needs_noise)) == ("dpm++", True, False)
    assert torch.equal(second.new_history(torch.ones(2, 3)), torch.zeros(2, 3))
    assert not step_schedule(ready("dpm++ first order")[0]).keeps_history
    assert second.to("meta").table.device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PNDMScheduler(), "PNDMScheduler is not one of DDPMScheduler, DDIMScheduler, DPMSolverMultistep"),
        (lambda: EulerDiscreteScheduler(), "EulerDiscreteScheduler is not one of"),
        (lambda: DDPMScheduler(thresholding=True), "thresholding=True sorts the values"),
        (lambda: DDIMScheduler(thresholding=True), "thresholding=True sorts the values"),
        (lambda: DPMSolverMultistepScheduler(thresholding=True), "thresholding=True sorts the values"),
        (lambda: DDPMScheduler(variance_type="learned_range"), "variance_type 'learned_range'"),
        (lambda: DDPMScheduler(variance_type="fixed_large_log"), "variance_type 'fixed_large_log'"),
        (lambda: DPMSolverMultistepScheduler(solver_order=3), "order 3"),
        (lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas"),
        (lambda: DPMSolverMultistepScheduler(variance_type="learned"), "variance_type 'learned'"),
        (lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type 'flow_prediction'"),
        (
            lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
            "algorithm_type 'dpmsolver'",
        ),
        (
            lambda: DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "an infinite coefficient .an epsilon prediction at zero",
        ),
    ],
)
def test_unsupported_schedulers_are_refused_with_a_reason(make, message):
    scheduler = make()
    scheduler.set_timesteps(5)
    with pytest.raises(UnsupportedScheduler, match=message):
        step_schedule(scheduler)


def test_a_scheduler_that_repeats_its_first_time_step_is_refused():
    scheduler = DPMSolverMultistepScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(timesteps=[900, 900, 500])
    with pytest.raises(UnsupportedScheduler, match="repeats its first time step"):
        step_schedule(scheduler)


def test_a_subclass_with_a_step_of_its_own_is_not_taken_for_its_base():
    class Mine(DDIMScheduler):
        pass

    scheduler = Mine()
    scheduler.set_timesteps(5)
    with pytest.raises(UnsupportedScheduler, match="Mine is not one of"):
        step_schedule(scheduler)


def test_misuse_of_a_scheduler_is_named():
    with pytest.raises(ValueError, match="has no time steps yet; call its set_timesteps first"):
        step_schedule(DDIMScheduler())
    with pytest.raises(ValueError, match=r"eta 0\.5 has no meaning for DDPMScheduler"):
        step_schedule(ready("ddpm leading")[0], eta=0.5)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], not 2"):
        step_schedule(ready("ddim leading")[0], eta=2.0)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4, dtype=torch.float64)}, "latents have dtype torch.float64"),
        ({"latents": torch.zeros(2, 4).half()}, "prediction has dtype torch.float32; it must have that of latents"),
        ({"prediction": torch.zeros(4, 4, dtype=torch.int32)}, "prediction has dtype torch.int32"),
        ({"prediction": torch.zeros(3, 4)}, r"prediction \[3, 4\] must be one or two batches of latents \[2, 4\]"),
        ({"prediction": torch.zeros(4, 5)}, r"prediction \[4, 5\] must be one or two batches"),
        ({"latents": torch.zeros(()), "prediction": torch.zeros(())}, "must be one or two batches"),
        ({"prediction": torch.zeros(4, 4, device="meta")}, "prediction is on meta, latents on cpu"),
        ({"guidance_scale": torch.ones(3)}, r"guidance_scale \[3\] .* must be a number or float32 \[2\]"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\], not 1.5"),
        ({"prediction": torch.zeros(2, 4)}, "guidance needs prediction of two batches"),
        ({"step": 3}, "step 3 is out of range: the schedule has the steps 0 to 2"),
        ({"step": -1}, "step -1 is out of range"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, r"step \[2\] torch.int64 on cpu must be an int, or one int32"),
        ({"step": torch.zeros(1)}, "step .* must be an int, or one int32"),
        ({"noise": None}, "step 1 of this dpm.. schedule adds noise; give noise"),
        ({"noise": None, "step": torch.ones((), dtype=torch.int64)}, "some step of this dpm.. schedule adds noise"),
        ({"noise": torch.zeros(2, 5)}, r"noise \[2, 5\] .* must be \[2, 4\] torch.float32 on cpu"),
        ({"noise": torch.zeros(2, 4).half()}, "noise .* torch.float16 .* must be"),
        ({"history": None}, r"schedule needs history, .* schedule.new_history\(latents\)"),
        ({"history": torch.zeros(2, 4).half()}, "history .* must be .* torch.float32"),
        ({"schedule": random_schedule().to("meta")}, "table is on meta, latents on cpu; move it once"),
        ({"latents": torch.zeros(2, 4, requires_grad=True)}, "guided_step records no gradient"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "latents": torch.zeros(2, 4),
        "prediction": torch.zeros(4, 4),
        "schedule": random_schedule(),
        "step": 1,
        "guidance_scale": 2.0,
        "noise": torch.zeros(2, 4),
        "history": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        guided_step(**arguments | change)


def test_a_step_tensor_out_of_range_raises():
    latents, prediction, noise, history = inputs((2, 4), DTYPES[0])
    for bad in (-1, 3):
        at = torch.tensor(bad)
        with pytest.raises(RuntimeError, match=f"step {bad} is out of range: the schedule has the steps 0 to 2"):
            guided_step(latents, prediction, random_schedule(), at, 1.0, 0.0, noise, history)
        with debug_checks(), pytest.raises(ValueError, match=rf"step\[0\] = {bad} is out of range"):
            guided_step(latents, prediction, random_schedule(), at, 1.0, 0.0, noise, history)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    x, table = torch.zeros(2, 4), torch.zeros(3, 8)
    good = {"latents": x, "prediction": x, "table": table, "step": 0, "step_tensor": None, "scales": None}
    good |= {"guidance_scale": 1.0, "guidance_rescale": 0.0, "noise": None, "history": None, "keep_x0": False}
    for change, message in (
        ({"table": torch.zeros(3, 7)}, "table"),
        ({"table": table.double()}, "table"),
        ({"step": 3}, "step 3 is out of range"),
        ({"step_tensor": torch.zeros(0, dtype=torch.int64)}, "must hold one number"),
        ({"step_tensor": torch.zeros(1)}, "must be int32 or int64"),
        ({"prediction": x[:1]}, "one or two batches"),
        ({"prediction": torch.zeros(2, 5)}, "one or two batches"),
        ({"latents": x.half()}, "prediction must have the dtype"),
        ({"scales": torch.ones(1)}, "guidance scales"),
        ({"noise": x[:1]}, "noise must have"),
        ({"history": x.half()}, "history must be float32"),
        ({"latents": x.sum(), "prediction": x.sum()}, "batch dimension"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS["guided_step"].overloads["default"](**good | change)


def test_a_missing_library_leaves_the_reference():
    latents, prediction, noise, history = inputs((2, 4), DTYPES[0])
    arguments = (latents, prediction, random_schedule(), 1, 2.0, 0.5, noise, history)
    with mock.patch("dreamkernels.ops.guided_step.choose", return_value="reference"):
        found = guided_step(*arguments)
    for a, b in zip(found, guided_step(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
