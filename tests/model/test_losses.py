"""Every loss option against an independent formula: diffusers' schedulers and plain arithmetic in float64."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from dreamllm.documents import pair
from dreamllm.model import PARAMETER_GROUPS, DiffusionDraws
from dreamllm.model.codec import encode_moments, encode_pictures
from dreamllm.model.diffusion import NoiseSchedule, diffusion_loss, draw_diffusion
from dreamllm.model.padded import null_states
from tests.tiny import NUM_QUERIES, random_picture, tiny_model

PICTURES = 3


@pytest.fixture
def setting():
    """Random latents, condition and draws for three pictures."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(PICTURES, 1, 8, 8, generator=generator)
    condition = torch.randn(PICTURES, NUM_QUERIES, 12, generator=generator)
    draws = DiffusionDraws(torch.tensor([3, 500, 999]), torch.randn(latents.shape, generator=generator))
    return latents, condition, draws


def build(tmp_path, **config):
    return tiny_model(tmp_path, **config)[0]


def loss_of(model, latents, condition, draws):
    with torch.no_grad():
        return diffusion_loss(model.config, model.schedule, model.unet, latents, condition, draws)


def reference_loss(model, latents, condition, draws, weights=None, noisy=None):
    """Written with diffusers' own scheduler."""
    scheduler = DDPMScheduler.from_config(model.config.scheduler_config)
    with torch.no_grad():
        if noisy is None:
            noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps)
        predicted = model.unet(noisy, draws.timesteps, condition).sample.double()
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, draws.noise, draws.timesteps) if velocity else draws.noise
    error = (predicted - target.double()).square().mean((1, 2, 3))
    return (error * (1 if weights is None else weights)).mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_loss_equals_diffusers(tmp_path, setting, prediction_type):
    model = build(tmp_path, prediction_type=prediction_type)
    torch.testing.assert_close(loss_of(model, *setting).double(), reference_loss(model, *setting), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_schedule_equals_diffusers(schedule):
    config = {"beta_schedule": schedule, "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    theirs = DDPMScheduler.from_config(config).alphas_cumprod
    ours = NoiseSchedule(config).alphas_cumprod(torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_min_snr_weight(tmp_path, setting):
    model = build(tmp_path, snr_gamma=5.0)
    alphas = DDPMScheduler.from_config(model.config.scheduler_config).alphas_cumprod.double()[setting[2].timesteps]
    snr = alphas / (1 - alphas)
    expected = reference_loss(model, *setting, weights=snr.clamp(max=5) / snr)
    torch.testing.assert_close(loss_of(model, *setting).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compat", ["default", "original"])
def test_min_snr_weight_for_velocity(tmp_path, setting, compat):
    model = build(tmp_path, snr_gamma=5.0, prediction_type="v_prediction", compat=compat)
    alphas = DDPMScheduler.from_config(model.config.scheduler_config).alphas_cumprod.double()[setting[2].timesteps]
    snr = alphas / (1 - alphas)
    bar = (snr + 1 if compat == "original" else snr).clamp(max=5)
    expected = reference_loss(model, *setting, weights=bar / (snr + 1))
    torch.testing.assert_close(loss_of(model, *setting).double(), expected, rtol=1e-5, atol=0)


def test_input_perturbation_changes_the_input_but_not_the_target(tmp_path, setting):
    model = build(tmp_path, input_perturbation=0.1)
    latents, condition, draws = setting
    draws.perturbation = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    scheduler = DDPMScheduler.from_config(model.config.scheduler_config)
    noisy = scheduler.add_noise(latents, draws.noise + 0.1 * draws.perturbation, draws.timesteps)
    expected = reference_loss(model, latents, condition, draws, noisy=noisy)
    torch.testing.assert_close(loss_of(model, *setting).double(), expected, rtol=1e-5, atol=0)


def test_noise_offset_shifts_whole_channels(tmp_path):
    model = build(tmp_path, noise_offset=0.5)
    shape = (64, 4, 8, 8)
    offset = draw_diffusion(model.config, shape, torch.device("cpu"), torch.Generator().manual_seed(1)).noise
    model.config.noise_offset = 0.0
    plain = draw_diffusion(model.config, shape, torch.device("cpu"), torch.Generator().manual_seed(1)).noise
    shift = offset - plain
    assert shift.var((2, 3)).max() < 1e-10
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.15)


def test_forward_process_is_float32_and_bfloat16_tables_only_in_compat(tmp_path, setting):
    """A bf16 table has no noise at the first timestep (spec A.9); ours has."""
    schedule = build(tmp_path).schedule
    cpu = torch.device("cpu")
    assert 1 - schedule.alphas_cumprod(cpu)[0] > 0.02**2
    assert 1 - schedule.alphas_cumprod(cpu, torch.bfloat16)[0] == 0.0


def encoded_pairs(processor, mode, count=PICTURES):
    captions = ["A fox", "The snow and a very long license", "Flour"][:count]
    return [processor.encode(pair(random_picture(i), c, mode)) for i, c in enumerate(captions)]


def test_condition_dropout_uses_the_empty_prompt(tmp_path):
    """Dropping every condition equals giving the empty prompt's; dropping none equals no dropout."""
    model, processor = tiny_model(tmp_path, condition_dropout=0.5)
    batch = processor.pack(encoded_pairs(processor, "creation"), with_null=True)
    timesteps, noise = torch.tensor([10, 400, 900]), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = model.states_packed(batch)
        null = states[batch.null_positions].expand(3, -1, -1)
        kept = states[batch.dream_positions]
        latents = batch.target_pixel_values
        for keep in (torch.zeros(3), torch.ones(3), torch.tensor([1, 0, 1])):
            draws = DiffusionDraws(timesteps, noise, keep_condition=keep.bool())
            ours = model.forward_packed(batch, draws=draws).vm_loss
            mixed = torch.stack([k if flag else n for flag, k, n in zip(keep, kept, null, strict=True)])
            plain = DiffusionDraws(timesteps, noise)
            expected = loss_of(model, latents, model.project_condition(mixed), plain)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_null_sequence_is_the_empty_prompt_used_at_inference(tmp_path):
    model, processor = tiny_model(tmp_path, condition_dropout=0.5)
    batch = processor.pack(encoded_pairs(processor, "creation"), with_null=True)
    with torch.no_grad():
        packed = model.states_packed(batch)[batch.null_positions]
        alone = null_states(model)
        model.config.compat = "original"
        without_queries = null_states(model)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert (without_queries - alone).abs().max() > 0.01


def test_condition_dropout_rate(tmp_path):
    model = build(tmp_path, condition_dropout=0.3)
    draws = draw_diffusion(model.config, (20000, 1, 1, 1), torch.device("cpu"), torch.Generator().manual_seed(0))
    assert 1 - draws.keep_condition.float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_condition_dropout_without_the_empty_prompt_is_an_error(tmp_path):
    model, processor = tiny_model(tmp_path, condition_dropout=0.5)
    with pytest.raises(ValueError, match="with_null=True"):
        model.forward_packed(processor.pack(encoded_pairs(processor, "creation")))


@pytest.mark.parametrize(("schedule", "scale"), [("none", 1.0), ("l1_norm", 5.0), ("l2_norm", 13.0**0.5)])
def test_loss_scales(tmp_path, schedule, scale):
    model, processor = tiny_model(tmp_path, loss_weight_lm=2.0, loss_weight_vm=3.0, loss_scale_schedule=schedule)
    documents = encoded_pairs(processor, "creation") + encoded_pairs(processor, "comprehension")
    output = model.forward_packed(processor.pack(documents), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.loss, (2 * output.lm_loss + 3 * output.vm_loss) / scale)


def test_language_loss_averages_over_learned_tokens_only(tmp_path):
    model, processor = tiny_model(tmp_path)
    documents = encoded_pairs(processor, "comprehension")
    batch = processor.pad(documents)
    with torch.no_grad():
        output = model(**batch)
        logits, labels = output.logits[:, :-1].double(), batch["labels"][:, 1:]
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        packed = model.forward_packed(processor.pack(documents))
    torch.testing.assert_close(output.lm_loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed.lm_loss.double(), expected, rtol=1e-5, atol=0)


def test_batch_with_nothing_to_learn_has_zero_language_loss(tmp_path):
    model, processor = tiny_model(tmp_path)
    output = model.forward_packed(processor.pack(encoded_pairs(processor, "creation")))
    assert output.lm_loss.item() == 0.0


def test_diffusion_gradient_reaches_queries_and_projector_but_not_frozen_parts(tmp_path):
    model, processor = tiny_model(tmp_path)
    model.set_trainable({"dream_queries", "condition_projector"})
    batch = processor.pack(encoded_pairs(processor, "creation"))
    model.forward_packed(batch, generator=torch.Generator().manual_seed(0)).loss.backward()
    for group, parameters in model.parameter_groups().items():
        trained = group in ("dream_queries", "condition_projector")
        assert all((p.grad is not None and p.grad.abs().sum() > 0) == trained for p in parameters), group


def test_parameter_groups_partition_the_parameters(tmp_path):
    model, _ = tiny_model(tmp_path, vae=True)
    grouped = [id(p) for parameters in model.parameter_groups().values() for p in parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert tuple(model.parameter_groups()) == PARAMETER_GROUPS


def test_unknown_parameter_group_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown parameter groups"):
        build(tmp_path).set_trainable({"everything"})


def test_vae_latents_are_scaled_posterior_samples(tmp_path):
    model, _ = tiny_model(tmp_path, vae=True)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = model.vae.encode(pixels).latent_dist
        draws = torch.stack([encode_pictures(model.vae, pixels, torch.Generator().manual_seed(i)) for i in range(400)])
    factor = model.vae.config.scaling_factor
    torch.testing.assert_close(
        draws.mean(0), posterior.mean * factor, rtol=0, atol=0.25 * factor * posterior.std.max().item()
    )
    assert (draws.std(0) / (posterior.std * factor)).mean().item() == pytest.approx(1, abs=0.02)


def test_latents_of_the_batch_stand_for_the_pictures(tmp_path):
    """Without pixels the VAE is not needed; one latent too few is an error."""
    model, processor = tiny_model(tmp_path, vae=True)
    batch = processor.pack([processor.encode(pair(random_picture(i), "the license", "creation")) for i in range(2)])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        latents = encode_pictures(model.vae, batch.target_pixel_values, generator)
    draws = draw_diffusion(model.config, tuple(latents.shape), latents.device, generator)
    expected = model.forward_packed(batch, draws=draws, target_latents=latents).vm_loss
    cached = replace(batch, target_pixel_values=None, target_latents=latents)
    model.vae = None
    assert model.forward_packed(cached, draws=draws).vm_loss == expected
    with pytest.raises(ValueError, match="2 dream slots but 1 target pictures"):
        model.forward_packed(replace(cached, target_latents=latents[:1]), draws=draws)


@pytest.mark.parametrize("unknown", [(), (1,), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_the_batch_give_the_bits_of_the_pictures(tmp_path, unknown, dtype):
    """The posterior is drawn from as if the VAE had just encoded, whether it knows all of the pictures or some."""
    model, processor = tiny_model(tmp_path, vae=True)
    model.to(dtype)
    encoded = [processor.encode(pair(random_picture(i), "the license", "creation")) for i in range(3)]
    online = processor.pack(encoded)
    with torch.no_grad():
        moments = encode_moments(model.vae, online.target_pixel_values)
        assert moments.dtype == dtype
        known = [None if i in unknown else row for i, row in enumerate(moments)]
        cached = processor.pack(encoded, moments=known)
        assert (0 if cached.target_pixel_values is None else len(cached.target_pixel_values)) == len(unknown)
        losses = [model.forward_packed(b, torch.Generator().manual_seed(3)).vm_loss for b in (online, cached)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="3 dream slots but moments of 2 pictures"):
        model.forward_packed(replace(cached, target_moments=moments[:2]))
    with pytest.raises(ValueError, match="3 pictures to create but moments of 2"):
        processor.pack(encoded, moments=[moments[0], None])


def test_a_unet_with_the_operators_gives_the_same_loss_and_gradients(tmp_path):
    model, processor = tiny_model(tmp_path, vae=True)
    batch = processor.pack([processor.encode(pair(random_picture(i), "the license", "creation")) for i in range(3)])
    names = list(model.state_dict())

    def run():
        model.zero_grad()
        loss = model.forward_packed(batch, torch.Generator().manual_seed(3)).loss
        loss.backward()
        return loss.detach(), model.dream_queries.grad.clone()

    model.set_trainable({"dream_queries"})
    assert {name.split(".")[0] for name in model.diffusion_operators.replaced} == {"unet", "vae"}
    ours = run()
    assert list(model.state_dict()) == names
    model.use_fused_operators(False)
    assert model.diffusion_operators is None
    for mine, theirs in zip(ours, run(), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_unet_that_is_trained_gets_its_gradients(tmp_path):
    model, processor = tiny_model(tmp_path)
    batch = processor.pack([processor.encode(pair(random_picture(0), "the license", "creation"))])
    model.set_trainable({"unet"})
    model.forward_packed(batch, torch.Generator().manual_seed(3)).loss.backward()
    assert all(p.grad is not None for p in model.unet.parameters())


@pytest.mark.parametrize("pictures", [1, 2, 5, None])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_less_memory_gives_the_same_loss_and_gradients(tmp_path, recompute, pictures):
    model, processor = tiny_model(tmp_path, vae=True, noise_offset=0.1, input_perturbation=0.1)
    documents = [pair(random_picture(i), "the license " * (i + 1), "creation") for i in range(5)]
    batch = processor.pack([processor.encode(document) for document in documents])
    model.train()
    model.set_trainable({"dream_queries", "language_model", "condition_projector"})
    counted = []
    model.unet.register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[0]))

    def run():
        counted.clear()
        model.zero_grad()
        loss = model.forward_packed(batch, torch.Generator().manual_seed(3)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = run()
    assert counted == [5]
    model.use_less_memory(recompute, pictures)
    for mine, theirs in zip(run(), expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    assert max(counted) == (pictures or 5)
    assert sum(counted) == 5
    with torch.no_grad():
        torch.testing.assert_close(model.forward_packed(batch, torch.Generator().manual_seed(3)).loss, expected[0])


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "attentions", "norms"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)], ids=lambda value: str(value)
)
def test_what_is_computed_again(tmp_path, mode, attentions, norms):
    """Operators of the decoder in one step, in passes over its layers."""
    model, processor = tiny_model(tmp_path)
    batch = processor.pack([processor.encode(pair(random_picture(0), "the license", "comprehension"))])
    model.train()
    model.set_trainable({"language_model"})
    model.use_less_memory(mode)
    with torch.no_grad(), Calls() as vision:
        model.encode_images(batch.pixel_values)
    with Calls() as step:
        model.forward_packed(batch).loss.backward()
    layers = model.config.text_config.num_hidden_layers
    assert step.names["dreamkernels::attention"] - vision.names["dreamkernels::attention"] == attentions * layers
    assert step.names["dreamkernels::add_rms_norm"] == norms * layers


@pytest.mark.parametrize(
    ("trained", "expected"), [({"language_model"}, "selective"), ({"dream_queries", "lm_head", "embeddings"}, "none")]
)
def test_auto_recomputes_where_layers_are_trained(tmp_path, trained, expected):
    model, _ = tiny_model(tmp_path)
    model.set_trainable(trained)
    model.use_less_memory()
    assert model.recompute_layers == expected
    assert all(layer.gradient_checkpointing == (expected != "none") for layer in model.decoder.layers)


def test_the_unets_activations_are_gone_before_the_backward_pass(tmp_path):
    """Its gradient is taken when its loss is: the backward pass runs no operator of the UNet."""
    model, processor = tiny_model(tmp_path)
    batch = processor.pack([processor.encode(pair(random_picture(i), "the license", "creation")) for i in range(2)])
    model.set_trainable({"dream_queries", "condition_projector"})
    with Calls() as forward:
        loss = model.forward_packed(batch).loss
    with Calls() as backward:
        loss.backward()
    name = "dreamkernels::group_norm_silu_backward"
    assert forward.names[name] > 0
    assert backward.names[name] == 0


def test_an_unknown_choice_of_what_to_recompute_is_an_error(tmp_path):
    model, _ = tiny_model(tmp_path)
    with pytest.raises(ValueError, match="recompute_layers must be one of auto, none, selective, full, not 'some'"):
        model.use_less_memory("some")


def test_pictures_per_pass_refuses_a_trained_unet(tmp_path):
    model, processor = tiny_model(tmp_path)
    batch = processor.pack([processor.encode(pair(random_picture(i), "the license", "creation")) for i in range(2)])
    model.use_less_memory(pictures_per_pass=1)
    model.set_trainable({"unet"})
    with pytest.raises(ValueError, match="a UNet that is not trained"):
        model.forward_packed(batch)
    with pytest.raises(ValueError, match="at least 1"):
        model.use_less_memory(pictures_per_pass=0)
