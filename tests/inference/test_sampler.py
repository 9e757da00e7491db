"""The sampler: our step equals the scheduler's own, any diffusers scheduler, callbacks, prepared conditions, graphs."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from dreamkernels import FallbackWarning, UnsupportedScheduler, step_schedule
from dreamllm.documents import Document, Text
from dreamllm.inference import DenoisingGraphs, DrawingOptions, Engine, draw
from dreamllm.inference import loop as loops
from dreamllm.model.diffusion import diffusion_loss, draw_diffusion
from tests.support.synchronisation import assert_never_waits
from tests.tiny import tiny_model

QUICK = DrawingOptions(steps=4, guidance_scale=3.0, scheduler="ddim")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Engine(*tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def conditions(tiny):
    prompts = [Document((Text(text),)) for text in ("A license", "The copy of the work", "Modify")]
    return tiny.conditions(prompts), tiny.null_condition()


@pytest.mark.parametrize(
    "options",
    [
        replace(QUICK, scheduler="ddpm"),
        replace(QUICK, scheduler="ddpm", guidance_rescale=0.7),
        replace(QUICK, eta=0.6),
        replace(QUICK, scheduler="dpm++", steps=6),
        replace(QUICK, guidance_scale=1.0),
    ],
    ids=lambda o: f"{o.scheduler} {o.guidance_scale} {o.guidance_rescale} {o.eta}",
)
def test_our_steps_are_those_of_the_scheduler(tiny, conditions, monkeypatch, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        ours = draw(tiny.model, *conditions, options, [0, 1, 2])

    def refuse(*arguments):
        raise UnsupportedScheduler("a test")

    monkeypatch.setattr(loops, "step_schedule", refuse)
    with pytest.warns(FallbackWarning, match=r"takes the steps of DD?\w+ in eager PyTorch: a test; expect"):
        theirs = draw(tiny.model, *conditions, options, [0, 1, 2])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 0.01


@pytest.mark.parametrize(
    "scheduler",
    [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler],
)
def test_any_scheduler_of_diffusers(tiny, conditions, scheduler):
    given = scheduler(**BETAS)
    before, seen = (given.num_inference_steps, dict(given.config)), []
    options = replace(QUICK, batch_size=2)
    with pytest.warns(FallbackWarning, match=scheduler.__name__) as caught:
        together = draw(
            tiny.model, *conditions, options, [0, 1, 2], scheduler=given, progress=lambda *done: seen.append(done)
        )
    assert len([w for w in caught if w.category is FallbackWarning]) == 1  # for both batches
    assert (given.num_inference_steps, dict(given.config)) == before  # the caller's own is left alone
    assert seen == [(k + 1, len(seen)) for k in range(len(seen))]
    with pytest.warns(FallbackWarning):
        alone = draw(tiny.model, conditions[0][2:], conditions[1], QUICK, [2], scheduler=given)
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-5)


def test_euler_written_out(tiny, conditions):
    """Its latents are scaled before the UNet sees them."""
    condition, null = conditions[0][:1], conditions[1]
    scheduler = EulerDiscreteScheduler(**BETAS)
    with pytest.warns(FallbackWarning):
        found = draw(tiny.model, condition, null, QUICK, [7], scheduler=scheduler)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(QUICK.steps)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7)) * scheduler.init_noise_sigma
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            sigma, following = scheduler.sigmas[k : k + 2]
            inside = x / (sigma**2 + 1).sqrt()
            e_c = tiny.model.unet(inside, t, condition).sample
            e_u = tiny.model.unet(inside, t, null[None]).sample
            x = x + (e_u + QUICK.guidance_scale * (e_c - e_u)) * (following - sigma)
    torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_given_scheduler_brings_its_own_schedule(tiny, conditions, scheduler):
    """The model's configuration plays no part; unless they are the same."""
    config = tiny.model.config.scheduler_config
    known = {k: v for k, v in config.items() if k in scheduler().config}
    name = {DDPMScheduler: "ddpm", DDIMScheduler: "ddim", DPMSolverMultistepScheduler: "dpm++"}[scheduler]
    wanted = draw(tiny.model, *conditions, replace(QUICK, scheduler=name), [0, 1, 2])
    same = draw(tiny.model, *conditions, QUICK, [0, 1, 2], scheduler=scheduler(**known))
    other = draw(tiny.model, *conditions, QUICK, [0, 1, 2], scheduler=scheduler(**known | {"beta_end": 0.02}))
    assert torch.equal(same, wanted)
    assert not torch.allclose(other, wanted)


def test_on_step_sees_and_may_replace_the_latents(tiny, conditions):
    seen = []
    plain = draw(tiny.model, *conditions, QUICK, [0, 1, 2], on_step=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    assert all(x.shape == (3, 1, 8, 8) and x.dtype == torch.float32 for _, x in seen)
    torch.testing.assert_close((seen[-1][1] / 2 + 0.5).clamp(0, 1), plain)
    grey = draw(tiny.model, *conditions, QUICK, [0, 1, 2], on_step=lambda done, x: x * 0 if done == 4 else None)
    assert torch.equal(grey, torch.full_like(grey, 0.5))
    with pytest.raises(ValueError, match=r"on_step returned latents \[2, 1, 8, 8\]; they must be \[3, 1, 8, 8\]"):
        draw(tiny.model, *conditions, QUICK, [0, 1, 2], on_step=lambda done, x: x[:2])


def test_a_prepared_condition_reaches_the_unet_as_it_is(tiny, conditions, monkeypatch):
    class Prepared:
        def __init__(self, context):
            self.context = context

    unet, made, received = tiny.model.unet, [], []
    forward = unet.forward

    def prepare(context):
        made.append(Prepared(context))
        return made[-1]

    def taking(latents, timestep, condition, **rest):
        received.append(condition)
        return forward(latents, timestep, condition.context, **rest)

    plain = draw(tiny.model, *conditions, QUICK, [0, 1, 2])
    monkeypatch.setattr(unet, "forward", taking)
    options = replace(QUICK, batch_size=2)
    found = draw(tiny.model, *conditions, options, [0, 1, 2], prepare_condition=prepare)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert [p.context.shape[0] for p in made] == [4, 2]  # once per batch: both halves of two pictures, then of one
    assert received == [made[0]] * 4 + [made[1]] * 4


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++"])
def test_the_host_never_waits_inside_the_loop(tiny, conditions, scheduler):
    options = replace(QUICK, scheduler=scheduler, guidance_rescale=0.5)
    condition, null = conditions
    schedule = step_schedule(loops.build_scheduler(tiny.model.config.scheduler_config, options))
    times = tiny.model.prepare_times(torch.tensor(schedule.timesteps))
    loop = loops.Loop(tiny.model.unet, options, schedule, tiny.model.prepare_condition, times)
    context = torch.cat([null.expand_as(condition), condition])
    with torch.no_grad(), assert_never_waits():
        latents = loop.run(torch.randn(3, 1, 8, 8), context, lambda: torch.randn(3, 1, 8, 8))
    assert latents.isfinite().all()


def test_training_and_drawing_call_the_unet_in_one_way(tiny, conditions, monkeypatch):
    """Through `dreamllm.model.diffusion.predict`, in the UNet's dtype whatever the latents have."""
    seen = []
    forward = tiny.model.unet.forward

    def watching(latents, timestep, condition, **rest):
        seen.append((latents.dtype, condition.columns.dtype, rest))
        return forward(latents, timestep, condition, **rest)

    monkeypatch.setattr(tiny.model.unet, "forward", watching)
    draw(tiny.model, *conditions, replace(QUICK, steps=1), [0, 1, 2])
    draws = draw_diffusion(tiny.model.config, (3, 1, 8, 8), torch.device("cpu"))
    with torch.no_grad():
        diffusion_loss(
            tiny.model.config,
            tiny.model.schedule,
            tiny.model.unet,
            torch.zeros(3, 1, 8, 8),
            tiny.model.prepare_condition(conditions[0]),
            draws,
        )
    assert seen == [(torch.float32, torch.float32, {})] * 2


def test_graphs_need_cuda(tiny, conditions):
    with pytest.raises(ValueError, match="CUDA graphs need a model on cuda, not on cpu; leave graphs=None"):
        draw(tiny.model, *conditions, QUICK, [0, 1, 2], graphs=DenoisingGraphs())


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++"])
def test_a_captured_loop_draws_the_same_pictures(tmp_path, scheduler):
    model, processor = tiny_model(tmp_path)
    engine = Engine(model.to("cuda"), processor)
    prompts = [Document((Text(text),)) for text in ("A license", "The copy of the work", "Modify")]
    condition, null = engine.conditions(prompts), engine.null_condition()
    options, graphs = replace(QUICK, scheduler=scheduler, guidance_rescale=0.5, batch_size=2), DenoisingGraphs()
    for seeds in ([0, 1, 2], [3, 4, 5]):
        wanted = draw(model, condition, null, options, seeds)
        torch.testing.assert_close(draw(model, condition, null, options, seeds, graphs=graphs), wanted)
    assert len(graphs) == 2  # batches of two and of one
    with pytest.raises(ValueError, match="on_step cannot look into a CUDA graph"):
        draw(model, condition, null, options, [0, 1, 2], on_step=lambda *step: None, graphs=graphs)
    with pytest.warns(FallbackWarning), pytest.raises(ValueError, match="stop the host, so they cannot be captured"):
        draw(model, condition, null, options, [0, 1, 2], scheduler=EulerDiscreteScheduler(), graphs=graphs)


def test_more_steps_than_a_given_scheduler_was_trained_with(tiny, conditions):
    with pytest.raises(ValueError, match="4 steps were asked for, but the noise schedule has only 3"):
        draw(tiny.model, *conditions, QUICK, [0, 1, 2], scheduler=DDIMScheduler(num_train_timesteps=3))
