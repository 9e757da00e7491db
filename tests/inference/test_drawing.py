"""Drawing: independence of pictures from each other, schedulers, and what is refused."""

from dataclasses import replace

import pytest
import torch

from dreamllm.documents import Document, Text
from dreamllm.inference import DrawingOptions, Engine, draw, drawing_defaults
from dreamllm.inference.drawing import build_scheduler, picture_seed, to_pil
from dreamllm.model import load_original
from tests.golden import reference
from tests.tiny import tiny_model

QUICK = DrawingOptions(steps=3, guidance_scale=3.0, scheduler="ddim")
SCHEDULERS = ("ddpm", "ddim", "dpm++")


@pytest.fixture(scope="module")
def golden():
    return load_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, processor = tiny_model(tmp_path_factory.mktemp("tiny"))
    return Engine(model, processor)


@pytest.fixture(scope="module")
def scaled_latents(tmp_path_factory):
    """A model with a VAE whose pictures keep within the range, as those of an untrained noise predictor do not."""
    model, processor = tiny_model(tmp_path_factory.mktemp("vae"), vae=True, prediction_type="v_prediction")
    return model.eval().requires_grad_(False), processor


@pytest.fixture(scope="module")
def conditions(tiny):
    prompts = [Document((Text(text),)) for text in ("A license", "The copy of the work", "Modify")]
    return tiny.conditions(prompts), tiny.null_condition()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_picture_does_not_depend_on_its_batch(tiny, conditions, scheduler):
    condition, null = conditions
    options = replace(QUICK, scheduler=scheduler, guidance_rescale=0.5)
    together = draw(tiny.model, condition, null, options, [5, 6, 7])
    alone = torch.cat([draw(tiny.model, condition[i : i + 1], null, options, [5 + i]) for i in range(3)])
    split = draw(tiny.model, condition, null, replace(options, batch_size=2), [5, 6, 7])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, split, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_are_those_of_the_libraries_own_code(scaled_latents, scheduler, rescale):
    """From the prompt to the pixels: language model, prepared conditions and times, UNet, steps and VAE."""
    model, processor = scaled_latents
    options = DrawingOptions(steps=25, guidance_scale=3.0, guidance_rescale=rescale, scheduler=scheduler)

    def pictures(fused, texts=("A license", "The copy of the work", "Modify")):
        model.use_fused_operators(fused)
        engine = Engine(model, processor)
        condition = engine.conditions([Document((Text(text),)) for text in texts])
        return draw(model, condition, engine.null_condition(), options, [0, 1, 2])

    ours, expected = pictures(True), pictures(False)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.9  # clamped values would hide differences
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
    other = pictures(True, ("A license", "Modify", "The copy of the work"))
    torch.testing.assert_close(other[0], expected[0], rtol=0, atol=1e-3)
    assert ((other - expected)[1:].abs().amax(dim=(1, 2, 3)) > 0.05).all()


def test_ddpm_follows_the_formulas_of_the_original(tiny, conditions):
    """Spec A.7, written out, with the noise taken from the picture's own generator."""
    condition, null = conditions[0][:1], conditions[1]
    steps, scale, seed = 4, 2.5, 3
    options = DrawingOptions(steps=steps, guidance_scale=scale, scheduler="ddpm")
    model, generator = tiny.model, torch.Generator().manual_seed(seed)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    ratio = 1000 // steps
    x = torch.randn(1, 1, 8, 8, generator=generator).double()
    with torch.no_grad():
        for t in [i * ratio + 1 for i in range(steps)][::-1]:
            e_c = model.unet(x.float(), t, condition).sample.double()
            e_u = model.unet(x.float(), t, null[None]).sample.double()
            e = e_u + scale * (e_c - e_u)
            ab, ab_prev = alpha_bar[t], alpha_bar[t - ratio] if t >= ratio else torch.ones(())
            a = ab / ab_prev
            x0 = (x - (1 - ab).sqrt() * e) / ab.sqrt()
            x = ab_prev.sqrt() * (1 - a) / (1 - ab) * x0 + a.sqrt() * (1 - ab_prev) / (1 - ab) * x
            variance = ((1 - ab_prev) / (1 - ab) * (1 - a)).clamp(min=1e-20)
            x = x + variance.sqrt() * torch.randn(1, 1, 8, 8, generator=generator)
    expected = (x.float() / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(model, condition, null, options, [seed]), expected, rtol=0, atol=1e-4)


def test_150_leading_steps_start_at_895(tiny):
    scheduler = build_scheduler(tiny.model.config.scheduler_config, DrawingOptions(steps=150))
    assert scheduler.timesteps[0] == 895


def test_without_guidance_the_null_condition_plays_no_part(tiny, conditions):
    condition, null = conditions
    options = replace(QUICK, guidance_scale=1.0)
    with_null = draw(tiny.model, condition, null, options, [0, 1, 2])
    without = draw(tiny.model, condition, None, options, [0, 1, 2])
    assert torch.equal(with_null, without)
    guided = draw(tiny.model, condition, null, QUICK, [0, 1, 2])
    assert not torch.allclose(guided, without)


def test_candidates_share_a_condition_and_differ_in_noise(tiny, conditions):
    condition, null = conditions
    options = replace(QUICK, candidates=2)
    pictures = draw(tiny.model, condition[:2], null, options, [1, 2, 3, 4])
    single = draw(tiny.model, condition[1:2], null, QUICK, [4])
    torch.testing.assert_close(pictures[3:], single, rtol=0, atol=1e-5)
    assert not torch.allclose(pictures[0], pictures[1])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_same_seed_gives_the_same_picture(tiny, conditions, scheduler):
    condition, null = conditions
    options = replace(QUICK, scheduler=scheduler)
    first, second = (draw(tiny.model, condition[:1], null, options, [9]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(tiny.model, condition[:1], null, options, [10]))


def test_eta_one_makes_ddim_stochastic_after_the_first_noise(tiny, conditions):
    condition, null = conditions
    start = torch.zeros(1, 1, 8, 8)
    noisy = replace(QUICK, eta=1.0)
    one, two = (draw(tiny.model, condition[:1], null, noisy, [seed], start) for seed in (1, 2))
    assert not torch.equal(one, two)
    one, two = (draw(tiny.model, condition[:1], null, QUICK, [seed], start) for seed in (1, 2))
    assert torch.equal(one, two)


def test_another_size(tiny, conditions):
    condition, null = conditions
    assert draw(tiny.model, condition, null, replace(QUICK, size=16), [0, 1, 2]).shape == (3, 1, 16, 16)


def test_no_condition_gives_no_picture(tiny, conditions):
    condition, null = conditions
    assert draw(tiny.model, condition[:0], null, QUICK, []).shape == (0, 1, 8, 8)


def test_progress_counts_every_step_of_every_batch(tiny, conditions):
    condition, null = conditions
    seen = []
    options = replace(QUICK, batch_size=2)
    draw(tiny.model, condition, null, options, [0, 1, 2], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_v_prediction_models_are_sampled_as_such(tmp_path):
    model, processor = tiny_model(tmp_path, prediction_type="v_prediction")
    assert build_scheduler(model.config.scheduler_config, QUICK).config.prediction_type == "v_prediction"
    assert Engine(model, processor).conditions([Document((Text("A"),))]).shape == (1, 4, 12)


def test_a_model_recommends_its_own_options(tiny, monkeypatch):
    assert drawing_defaults(tiny.model) == DrawingOptions()
    monkeypatch.setattr(tiny.model.config, "drawing", {"steps": 25, "scheduler": "ddim"})
    assert drawing_defaults(tiny.model) == DrawingOptions(steps=25, scheduler="ddim")
    monkeypatch.setattr(tiny.model.config, "drawing", {"stepz": 25})
    with pytest.raises(ValueError, match="stepz"):
        drawing_defaults(tiny.model)


def test_pictures_become_eight_bit_images():
    grey = to_pil(torch.tensor([[[0.0, 0.5], [1.0, 2.0]]]))
    assert grey.mode == "L"
    assert list(grey.tobytes()) == [0, 128, 255, 255]
    assert to_pil(torch.rand(3, 4, 6)).size == (6, 4)


def test_a_requests_first_picture_has_the_requests_seed():
    assert picture_seed(42, 0) == 42
    later = {picture_seed(seed, index) for seed in range(20) for index in range(1, 6)}
    assert len(later) == 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scheduler": "euler"}, "unknown scheduler 'euler'; known: ddpm, ddim, dpm"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\]"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"eta": 0.5, "scheduler": "ddpm"}, "eta 0.5 has no meaning for scheduler 'ddpm'"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DrawingOptions(**wrong)


@pytest.mark.parametrize("size", [0, -8, 7, 9])
def test_a_size_the_model_cannot_draw_is_refused(tiny, conditions, size):
    with pytest.raises(ValueError, match="size must be a positive multiple of 2 pixels"):
        draw(tiny.model, *conditions, replace(QUICK, size=size), [0, 1, 2])


def test_a_size_not_divisible_by_eight_is_refused(golden):
    model, _ = golden
    condition = model.project_condition(reference.array("prompt_embeds"))
    with pytest.raises(ValueError, match="size must be a positive multiple of 8 pixels, not 60"):
        draw(model, condition, condition[0], replace(QUICK, size=60), [0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": [1, 2]}, "2 seeds were given, but 3 are needed, one per picture"),
        ({"seeds": [1, 2, -3]}, r"a seed must be in \[0, 2\*\*63\), not -3"),
        ({"null": None}, "guidance_scale 3.0 needs the null condition"),
        ({"init_latents": torch.zeros(3, 4, 8, 8)}, r"init_latents must be \[3, 1, 8, 8\]"),
        ({"options": replace(QUICK, steps=1001)}, "1001 steps were asked for, but the noise schedule has only 1000"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(tiny, conditions, call, message):
    condition, null = conditions
    given = {"null": null, "options": QUICK, "seeds": [0, 1, 2], "init_latents": None} | call
    with pytest.raises(ValueError, match=message):
        draw(tiny.model, condition, given["null"], given["options"], given["seeds"], given["init_latents"])


def test_a_condition_of_the_wrong_shape_is_refused(tiny, conditions):
    with pytest.raises(ValueError, match=r"condition must be \[M, 4, 12\], not \[3, 5, 12\]"):
        draw(tiny.model, torch.zeros(3, 5, 12), conditions[1], QUICK, [0, 1, 2])


def test_the_null_condition_is_kept_until_a_parameter_changes(tmp_path):
    model, processor = tiny_model(tmp_path)
    engine = Engine(model, processor)
    first = engine.null_condition()
    negative = engine.null_condition("the copy")
    assert engine.null_condition() is first
    assert engine.null_condition("the copy") is negative
    model.requires_grad_(False)
    model.set_trainable({"dream_queries"})
    model.dream_queries.grad = torch.ones_like(model.dream_queries)
    torch.optim.AdamW([model.dream_queries], lr=0.1).step()
    second = engine.null_condition()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model.project_condition(engine.null_states()).detach())
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
    assert engine.null_condition() is not second


def test_a_negative_prompt_replaces_the_empty_one(tiny):
    negative = tiny.null_condition("the copy")
    assert not torch.allclose(negative, tiny.null_condition())
    torch.testing.assert_close(negative, tiny.conditions([Document((Text("the copy"),))])[0])


def test_only_the_latest_null_conditions_are_kept(tiny):
    kept = [tiny.null_condition("A" * count) for count in range(10)]
    assert tiny.null_condition("A" * 9) is kept[9]
    assert tiny.null_condition("A" * 2) is kept[2]
    assert tiny.null_condition() is not kept[0]
    torch.testing.assert_close(tiny.null_condition(), kept[0])


def test_given_options_change_recommended_ones():
    recommended = DrawingOptions(scheduler="ddim", eta=0.5, steps=7)
    assert recommended.changed(steps=None, guidance_scale=3.0) == replace(recommended, guidance_scale=3.0)
    assert recommended.changed(scheduler="dpm++") == replace(recommended, scheduler="dpm++", eta=0.0)
    with pytest.raises(ValueError, match=r"eta 0\.5 has no meaning"):
        recommended.changed(scheduler="ddpm", eta=0.5)
