"""diffusers' models after `optimize`: as exact as eager, with everything else as it was."""

import copy
import re

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from dreamkernels import DreamCondition
from dreamkernels.integrations.diffusers import optimize
from tests.support.diffusers_models import (
    UNETS,
    WIDTH,
    assert_close_to_eager_error,
    converted,
    extra_conditions,
    make_controlnet,
    make_unet,
    make_vae,
    picture_and_gradient,
)
from tests.support.operators import dtype_name

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def conditions(pictures: int = 2, keys: int = 20) -> torch.Tensor:
    return torch.randn(pictures, keys, WIDTH)


def latents(pictures: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(pictures, 4, height, width)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["weights may change", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", UNETS)
def test_pictures_and_gradients_are_as_exact_as_eager(kind, dtype, frozen):
    unet, x, states, extra = make_unet(kind), latents(), conditions(), extra_conditions(kind, 2)

    def run(condition):
        own = condition.dtype
        return unet(x.to(own), torch.tensor([10, 700]), condition, **converted(extra, own)).sample

    exact = picture_and_gradient(lambda c: run(c), states.double()) if unet.double() is unet else None
    unet.to(dtype)
    eager = picture_and_gradient(run, states.to(dtype))
    with optimize(unet, frozen=frozen):
        ours = picture_and_gradient(run, states.to(dtype))
    for name, mine, theirs, truth in zip(("picture", "gradient"), ours, eager, exact, strict=True):
        assert_close_to_eager_error(mine, theirs, truth, what=name)


@pytest.mark.parametrize("frozen", [False, True])
def test_latents_of_any_size(frozen):
    unet, states = make_unet().double(), conditions().double()
    for height, width in ((16, 16), (10, 14), (9, 7)):
        x = latents(2, height, width)
        exact = unet.double()(x.double(), 3, states).sample
        eager = unet.float()(x, 3, states.float()).sample
        with optimize(unet, frozen=frozen):
            assert_close_to_eager_error(unet(x, 3, states.float()).sample, eager, exact, what=f"{height}x{width}")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_vae_encodes_and_decodes_as_exactly_as_eager(dtype, frozen):
    vae, picture, z = make_vae(), torch.rand(2, 3, 32, 32), torch.randn(2, 4, 16, 16)

    def run(own):
        return vae.encode(picture.to(own)).latent_dist.mean, vae.decode(z.to(own)).sample

    vae.double()
    exact = run(torch.float64)
    vae.to(dtype)
    eager = run(dtype)
    with optimize(vae, frozen=frozen) as report:
        ours = run(dtype)
    assert report.replaced["decoder.conv_norm_out"] == "group_norm_silu"
    for name, mine, theirs, truth in zip(("latents", "picture"), ours, eager, exact, strict=True):
        assert_close_to_eager_error(mine, theirs, truth, what=name)


def test_controlnet_and_the_unet_that_takes_its_residuals():
    unet, controlnet = make_unet(), make_controlnet()
    x, states, hint = latents(), conditions(), torch.rand(2, 3, 32, 32)

    def run(own):
        down, middle = controlnet(x.to(own), 5, states.to(own), hint.to(own), return_dict=False)
        picture = unet(
            x.to(own),
            5,
            states.to(own),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return *down, middle, picture

    unet.double(), controlnet.double()
    exact = run(torch.float64)
    unet.float(), controlnet.float()
    eager = run(torch.float32)
    with optimize(unet), optimize(controlnet, frozen=True):
        ours = run(torch.float32)
    for number, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_close_to_eager_error(mine, theirs, truth, what=f"residual {number}")


def test_large_logits_in_half_precision_stay_finite():
    unet = make_unet().half()
    with torch.no_grad():
        for block in unet.modules():
            if hasattr(block, "to_q"):
                block.to_q.weight.mul_(200)  # logits far beyond float16's 65504
                block.to_k.weight.mul_(200)
    with optimize(unet), torch.no_grad():
        assert unet(latents().half(), 5, conditions().half()).sample.isfinite().all()


# -- what an optimised UNet takes beyond diffusers' --------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["weights may change", "frozen"])
def optimised(request):
    unet = make_unet()
    with optimize(unet, frozen=request.param) as report:
        yield unet, report


def test_a_prepared_condition_and_a_time_table_give_the_same_picture_and_gradient(optimised):
    unet, report = optimised
    x, states = latents(), conditions()
    expected = picture_and_gradient(lambda c: unet(x, 500, c).sample, states)
    table = report.time_table(torch.tensor([999, 500, 0]))
    prepared = picture_and_gradient(lambda c: unet(x, table[1], report.condition(c)).sample, states)
    for mine, truth in zip(prepared, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)
    assert [len(table), len(table[:2])] == [3, 2]
    with pytest.raises(IndexError, match="3 time steps; there is no 3"):
        table[3]


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided halves"])
def test_each_latent_may_be_at_a_time_of_its_own(optimised, guided):
    unet, report = optimised
    x, table = latents(), report.time_table(torch.tensor([999, 500, 0]))
    states = [conditions() for _ in range(1 + guided)]
    both = report.condition(torch.cat(states))
    with torch.no_grad():
        found = unet(x, table[[2, 1]], both).sample.unflatten(0, (1 + guided, 2))
        for row, time in enumerate((0, 500)):
            for half, state in enumerate(states):
                wanted = unet(x[row : row + 1], time, state[row : row + 1]).sample[0]
                torch.testing.assert_close(found[half, row], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError, match="3 time steps; there is no 7"):
        table[[0, 7]]
    with pytest.raises(ValueError, match="times of 3 latents were given for 2"):
        unet(x, table[[0, 1, 2]], report.condition(conditions(2)))


def test_the_projector_is_applied_to_the_states(optimised):
    unet, report = optimised
    projector, states = torch.randn(WIDTH, 7), torch.randn(2, 5, 7)
    condition = report.condition(states, projector)
    torch.testing.assert_close(condition.columns, report.condition(states @ projector.T).columns)
    k, v = condition.key_value(1)
    attn = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    torch.testing.assert_close(k.flatten(2), attn.to_k(states @ projector.T), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v.flatten(2), attn.to_v(states @ projector.T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [torch.tensor(7), torch.tensor([7, 800])], ids=["one time", "a time each"])
def test_latents_given_once_serve_both_halves_of_a_guided_batch(optimised, times):
    unet, report = optimised
    x, null, states = latents(2), conditions(1), conditions(2)
    both = torch.cat([null.expand_as(states), states])
    twice = times.repeat(2) if times.dim() else times
    expected = unet(torch.cat([x, x]) + 0.0, twice, both).sample
    guided = DreamCondition.concatenate(report.condition(null), report.condition(states))
    for condition in (both, guided):
        torch.testing.assert_close(unet(x, times, condition).sample, expected, rtol=1e-4, atol=1e-5)


def test_the_shared_prefix_is_computed_once(optimised):
    unet, _ = optimised
    seen = []
    hook = unet.down_blocks[0].resnets[0].conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    x = latents(2)
    with torch.no_grad():
        unet(torch.cat([x, x]), 7, conditions(4))
        unet(latents(4), 7, conditions(4))
        unet(x, 7, conditions(4))
    hook.remove()
    assert seen == [2, 4, 2]


def test_two_guided_pictures_share_a_condition(optimised):
    unet, report = optimised
    x, states = latents(4), conditions(2)
    repeated = report.condition(states).repeat(2)
    expected = unet(x, 7, states.repeat_interleave(2, dim=0)).sample
    torch.testing.assert_close(unet(x, 7, repeated).sample, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named(optimised):
    unet, report = optimised
    x, condition = latents(2), report.condition(conditions(3))
    with pytest.raises(ValueError, match="2 latents were given with a condition for 3 pictures; possible are 2, or 4"):
        unet(x, 7, condition)
    with pytest.raises(ValueError, match="2 latents were given with a condition for 3 pictures"):
        unet(x, 7, conditions(3))
    with pytest.raises(ValueError, match="3 time steps were given for 2 latents"):
        unet(x, torch.tensor([1, 2, 3]), conditions(2))
    with pytest.raises(ValueError, match="does not take states of width 7"):
        report.condition(torch.randn(2, 5, 7), torch.randn(WIDTH, 6))
    with pytest.raises(ValueError, match=f"must be .conditions, keys, {WIDTH}.; give a projector"):
        report.condition(torch.randn(2, 5, 7))
    other = make_unet(attention_head_dim=[2, 2, 2])
    with optimize(other) as another:
        with pytest.raises(ValueError, match="made for another model"):
            unet(x, 7, another.condition(conditions(2)))
        with pytest.raises(ValueError, match="not optimised by the call"):
            report.condition(conditions(2), unet=other)
    wider = make_unet(block_out_channels=(16, 32, 48))
    with optimize(wider) as another, pytest.raises(ValueError, match="time table was made for a UNet with blocks of"):
        unet(x, another.time_table(torch.tensor([3]))[0], conditions(2))
    mask = torch.ones(2, 20)
    with pytest.raises(ValueError, match="DreamCondition cannot be combined with attention masks"):
        unet(x, 7, report.condition(conditions(2)), encoder_attention_mask=mask)
    with pytest.raises(ValueError, match=r"must be \[pictures, channels, height, width\]"):
        unet(x[0], 7, conditions(2))


def test_xl_has_no_time_table():
    unet = make_unet("xl")
    with optimize(unet) as report:
        assert report.takes_conditions(unet)
        assert not report.takes_time_tables(unet)
        with pytest.raises(ValueError, match="takes no time table: its time embedding depends on the prompt"):
            report.time_table(torch.tensor([3]))


# -- keys and values are kept, and made anew when they must ------------------------------------------------------------


class Calls:
    """Counts the calls of every key projection of the conditions."""

    def __init__(self, unet):
        self.count = 0
        for name, module in unet.named_modules():
            if name.endswith("attn2.to_k"):
                module.register_forward_hook(self._seen)
                self.layers = getattr(self, "layers", 0) + 1

    def _seen(self, *arguments):
        self.count += 1

    def since(self):
        count, self.count = self.count, 0
        return count // self.layers


def test_keys_and_values_stay_while_the_condition_does(optimised):
    unet, _ = optimised
    calls, x, states = Calls(unet), latents(), conditions()
    with torch.no_grad():
        for _ in range(3):
            unet(x, 7, states)
        assert calls.since() == 1
        before = unet(x, 7, states).sample
        states.mul_(2)
        changed = unet(x, 7, states).sample
        assert calls.since() == 1
        assert not torch.equal(before, changed)
        torch.testing.assert_close(changed, unet(x, 7, states.clone()).sample)
        assert calls.since() == 1
        unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(2)
        assert not torch.equal(unet(x, 7, states).sample, changed)
    states.requires_grad_()
    calls.since()
    for _ in range(2):
        unet(x, 7, states)
    assert calls.since() == 2


def test_keys_and_values_do_not_outlive_their_condition():
    unet = make_unet()
    report = optimize(unet)
    states = conditions()
    with torch.no_grad():
        unet(latents(), 7, states)
    caches = [cache for plan in report._plans.values() for cache in plan.caches.values()]
    assert [cache._kept is None for cache in caches] == [False] * 7
    del states
    assert [cache._kept is None for cache in caches] == [True] * 7


def test_kept_values_of_inference_mode_do_not_reach_autograd():
    unet, x, states = make_unet(), latents(), conditions()
    with optimize(unet):
        with torch.inference_mode():
            unet(x, 7, states)
        x.requires_grad_()
        unet(x, 7, states).sample.sum().backward()
        assert x.grad.isfinite().all()


def test_a_frozen_weight_that_is_written_to_is_noticed():
    unet, x, states = make_unet(), latents(), conditions()
    other = make_unet()
    with torch.no_grad():
        expected = other(x, 7, states).sample
        with optimize(unet, frozen=True) as report:
            before = unet(x, 7, states).sample
            unet.load_state_dict(other.state_dict())
            torch.testing.assert_close(unet(x, 7, states).sample, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(before, expected, atol=1e-2)
            for parameter in unet.parameters():
                parameter.data.mul_(1.25)
            report.refresh()
            changed = unet(x, 7, states).sample
        torch.testing.assert_close(changed, unet(x, 7, states).sample, rtol=1e-4, atol=1e-5)


def test_frozen_leaves_what_is_trained():
    unet, x, states = make_unet(), latents(), conditions()
    trained = unet.down_blocks[0].resnets[0].conv1.requires_grad_(True)
    report = optimize(unet, frozen=True)
    assert "requires_grad" in report.left["down_blocks.0.resnets.0.conv1"]
    unet(x, 7, states).sample.square().sum().backward()
    ours = trained.weight.grad.clone()
    trained.weight.grad = None
    report.undo()
    unet(x, 7, states).sample.square().sum().backward()
    assert (ours - trained.weight.grad).norm() <= 1e-4 * ours.norm()


# -- everything else stays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_undo_gives_back_the_same_model(frozen):
    unet, x, states = make_unet(), latents(), conditions()
    names, formats = list(unet.state_dict()), [p.stride() for p in unet.parameters()]
    before = unet(x, 7, states).sample
    report = optimize(unet, frozen=frozen)
    assert list(unet.state_dict()) == names
    assert re.search(r"down_blocks\.\*\.resnets\.\* +3 x  group_norm_silu", str(report))
    with pytest.raises(ValueError, match="optimised already"):
        optimize(unet)
    report.undo()
    assert torch.equal(unet(x, 7, states).sample, before)
    assert [p.stride() for p in unet.parameters()] == formats


def test_a_copy_of_an_optimised_model_works_on_its_own(optimised):
    unet, report = optimised
    x, states = latents(), conditions()
    expected = unet(x, 7, states).sample
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(x, 7, states).sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a copy of an optimised UNet"):
        copied(x, 7, report.condition(states))


def test_an_optimised_unet_compiles():
    unet, x, states = make_unet(), latents(), conditions()
    expected = unet(x, 7, states).sample
    torch._dynamo.reset()
    with optimize(unet, frozen=True), torch.no_grad():
        compiled = torch.compile(unet, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(x, 7, states).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["channels_last", "group_norm_silu", "layer_norm", "geglu", "attention"])
def test_each_option_can_be_left_out(option):
    unet, x, states = make_unet(), latents(), conditions()
    expected = unet(x, 7, states).sample
    with optimize(unet, **{option: False}) as report:
        torch.testing.assert_close(unet(x, 7, states).sample, expected, rtol=1e-4, atol=1e-5)
        assert option == "channels_last" or f"{option}=False" in str(report)


def test_an_optimised_model_is_saved_and_loaded_as_ever(tmp_path):
    unet, x, states = make_unet(), latents(), conditions()
    expected = unet(x, 7, states).sample
    with optimize(unet, frozen=True):
        unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x, 7, states).sample, expected)


def test_adapters_keep_working():
    peft = pytest.importorskip("peft")
    unet, x, states = make_unet(), latents(), conditions()
    plain = copy.deepcopy(unet)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj", "conv1"])

    def adapt(model):
        torch.manual_seed(1)
        model.add_adapter(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)

    def results(model):
        out = [model(x, 7, states).sample]
        out[0].square().sum().backward()
        out += [p.grad.clone() for name, p in model.named_parameters() if "lora_" in name]
        with torch.no_grad():
            out += [model(x, 7, states).sample, model(x, 7, states).sample]
            model.disable_adapters()
            out.append(model(x, 7, states).sample)
            model.enable_adapters()
            out.append(model(x, 7, states, cross_attention_kwargs={"scale": 0.5}).sample)
        return out

    adapt(plain)
    expected = results(plain)
    for frozen in (False, True):
        model = make_unet()
        model.load_state_dict(unet.state_dict())
        with optimize(model, frozen=frozen) as report:
            assert not torch.allclose(model(x, 7, states).sample, expected[0], atol=1e-2)
            adapt(model)  # after the optimisation: the layers that it knew are wrapped now
            for number, (mine, truth) in enumerate(zip(results(model), expected, strict=True)):
                torch.testing.assert_close(mine, truth, rtol=1e-3, atol=2e-3, msg=lambda m, n=number: f"{n}: {m}")
            with torch.no_grad():
                prepared = model(x, 7, report.condition(states)).sample
            torch.testing.assert_close(prepared, expected[0], rtol=1e-3, atol=1e-4)


def test_other_attention_processors_masks_freeu_and_checkpointing_keep_working(optimised):
    unet, report = optimised
    x, states = latents(), conditions()
    mask = torch.ones(2, 20)
    mask[:, 12:] = 0
    masked = unet(x, 7, states, encoder_attention_mask=mask).sample
    torch.testing.assert_close(masked, unet(x, 7, states[:, :12].contiguous()).sample, rtol=1e-3, atol=1e-4)

    expected = picture_and_gradient(lambda c: unet(x, 7, c).sample, states)
    unet.enable_gradient_checkpointing()
    unet.train()
    checkpointed = picture_and_gradient(lambda c: unet(x, 7, c).sample, states)
    with pytest.raises(ValueError, match="time table cannot be given"):
        unet(x, report.time_table(torch.tensor([7]))[0], states)
    unet.eval()
    unet.disable_gradient_checkpointing()
    for mine, truth in zip(checkpointed, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)

    before = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(unet(x, 7, states).sample, expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="DreamCondition cannot be combined with a AttnProcessor"):
        unet(x, 7, report.condition(states))
    unet.set_attn_processor(before)

    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    free = unet(x, 7, states).sample
    report.undo()
    torch.testing.assert_close(free, unet(x, 7, states).sample, rtol=1e-3, atol=1e-4)
    unet.disable_freeu()


def test_parts_that_are_left_are_named():
    unet = make_unet()
    unet.down_blocks[0].resnets[0].nonlinearity = torch.nn.GELU()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.norm_q = torch.nn.LayerNorm(16)
    x, states = latents(), conditions()
    expected = unet(x, 7, states).sample
    with optimize(unet) as report:
        assert "GELU, not SiLU" in report.left["down_blocks.0.resnets.0"]
        assert "attn1 has norm_q" in report.left["mid_block.attentions.0.transformer_blocks.0"]
        torch.testing.assert_close(unet(x, 7, states).sample, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(
            ValueError, match="this UNet takes no DreamCondition: a BasicTransformerBlock keeps its own"
        ):
            report.condition(states)
    assert "contains no UNet2DConditionModel" in str(optimize(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="takes a module or a DiffusionPipeline, not a dict"):
        optimize({})


def test_float64_is_left_with_the_reason():
    unet = make_unet().double()
    with optimize(unet) as report:
        assert "float64" in report.left["down_blocks.0.resnets.0"]
        unet(latents().double(), 7, conditions().double())


def test_an_ordinary_pipeline():
    parts = {
        "unet": make_unet(),
        "vae": make_vae(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        return pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=null,
            num_inference_steps=4,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images

    states, null = conditions(2), conditions(2)
    expected = draw()
    with optimize(pipeline, frozen=True) as report:
        calls = Calls(pipeline.unet)
        torch.testing.assert_close(draw(), expected, rtol=0, atol=1e-3)
        assert calls.since() == 1
        assert {name.split(".")[0] for name in report.replaced} == {"unet", "vae"}
    assert torch.equal(draw(), expected)
