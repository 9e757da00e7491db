"""The condition of a UNet: grouped product, attention, repetition, guidance, files."""

import sys

import pytest
import torch
import torch.nn.functional as F

from dreamkernels import (
    ConditionLayer,
    ConditionWeights,
    DreamCondition,
    condition_kv,
    cross_conditioning,
)
from dreamkernels.testing import assert_within_eager_error
from tests.support.conditioning import LAYERS, WIDTH, attentions, random_condition
from tests.support.operators import assert_close_to_float64

DTYPES = (torch.float32, torch.bfloat16)


def weights_of(modules):
    return ConditionWeights.concatenate((m.to_k.weight, m.to_v.weight, m.heads) for m in modules)


def attend(module, condition, layer, x):
    """One cross-attention layer as a UNet runs it, with the kept keys and values."""
    q = module.to_q(x).unflatten(-1, (module.heads, -1))
    return module.to_out[0](condition.attend(layer, q).flatten(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layer_equals_the_attention_of_diffusers(dtype):
    modules = attentions(dtype)
    states, projector = torch.randn(2, 64, 96).to(dtype), torch.nn.Linear(96, WIDTH, bias=False).to(dtype)
    condition = condition_kv(states, weights_of(modules), projector)
    for layer, module in enumerate(modules):
        x = torch.randn(2, 50, module.query_dim).to(dtype)
        exact = module.double()(x.double(), encoder_hidden_states=projector.double()(states.double()))
        module.to(dtype), projector.to(dtype)
        eager = module(x, encoder_hidden_states=projector(states))
        assert_within_eager_error(attend(module, condition, layer, x), eager, exact, what=f"layer {layer}")


def test_gradients_of_states_and_projector_are_those_of_diffusers():
    modules, projector = attentions(), torch.nn.Linear(96, WIDTH)
    states = torch.randn(2, 20, 96, requires_grad=True)
    inputs = [torch.randn(2, 30, m.query_dim) for m in modules]

    def ours():
        condition = condition_kv(states, weights_of(modules), projector)
        return [attend(m, condition, k, x) for k, (m, x) in enumerate(zip(modules, inputs, strict=True))]

    def theirs():
        return [m(x, encoder_hidden_states=projector(states)) for m, x in zip(modules, inputs, strict=True)]

    wanted = [states, *projector.parameters()]
    found, expected = (torch.autograd.grad(sum(y.square().sum() for y in f()), wanted) for f in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_grouped_product_is_as_exact_as_one_product_per_layer():
    modules = attentions()
    projector = torch.randn(WIDTH, 96) / 10

    def grouped(states):
        return condition_kv(
            states, ConditionWeights(whole, layers).to(dtype=states.dtype), projector.to(states)
        ).columns

    def single(states):
        condition = F.linear(states, projector.to(states))
        return torch.cat(
            [F.linear(condition, w.to(states)) for m in modules for w in (m.to_k.weight, m.to_v.weight)], -1
        )

    whole, layers = weights_of(modules).weight, weights_of(modules).layers
    for dtype in DTYPES:
        assert_close_to_float64(grouped, single, lambda d=dtype: [torch.randn(2, 33, 96).to(d).requires_grad_()])


def test_keys_and_values_are_views_and_repeating_copies_nothing():
    condition = random_condition()
    memory = condition.columns.untyped_storage().data_ptr()
    for layer, (heads, width, _) in enumerate(LAYERS):
        for part in condition.repeat(5).key_value(layer):
            assert part.shape == (2, 6, heads, width)
            assert part.untyped_storage().data_ptr() == memory
    assert condition.repeat(5).repeat(2).pictures == 20
    assert condition.pictures == 2


def test_weights_of_a_layer_are_views_that_a_unet_can_share():
    modules = attentions()
    weights = weights_of(modules)
    for layer, module in enumerate(modules):
        key, value = weights.layer_weights(layer)
        assert torch.equal(key, module.to_k.weight)
        assert torch.equal(value, module.to_v.weight)
        assert key.untyped_storage().data_ptr() == weights.weight.untyped_storage().data_ptr()


def test_repeated_conditions_serve_their_pictures_side_by_side():
    condition = random_condition(conditions=2)
    q = torch.randn(6, 11, 2, 16)
    found = condition.repeat(3).attend(0, q)
    k, v = (part.repeat_interleave(3, 0) for part in condition.key_value(0))
    assert torch.equal(found, cross_conditioning(q, k, v))


def test_guidance_runs_the_null_condition_first():
    null, condition = random_condition(conditions=1), random_condition(conditions=2)
    guided = DreamCondition.concatenate(null, condition.repeat(3))
    assert guided.pictures == 12
    assert guided.columns.shape[0] == 4
    q = torch.randn(12, 9, 3, 8)
    found = guided.attend(1, q)
    unguided = null.repeat(6).attend(1, q[:6])
    assert torch.equal(found, torch.cat([unguided, condition.repeat(3).attend(1, q[6:])]))


def test_a_saved_condition_is_read_back(tmp_path):
    for dtype in DTYPES:
        condition = random_condition(dtype=dtype).repeat(3)
        condition.save(tmp_path / "condition.safetensors")
        loaded = DreamCondition.load(tmp_path / "condition.safetensors")
        assert torch.equal(loaded.columns, condition.columns)
        assert loaded.columns.dtype == dtype
        assert (loaded.layers, loaded.repeats) == (condition.layers, 3)


def test_a_file_that_is_no_condition_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"columns": torch.zeros(1, 2, 3)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="is not a condition"):
        DreamCondition.load(tmp_path / "other.safetensors")


def test_files_need_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        random_condition().save(tmp_path / "condition.safetensors")


def test_conversions():
    condition = random_condition().repeat(2)
    half = condition.to(dtype=torch.bfloat16)
    assert half.columns.dtype == torch.bfloat16
    assert half.key_value(0)[0].dtype == torch.bfloat16
    assert half.repeats == 2
    assert condition.to("meta").columns.device.type == "meta"


def test_a_batch_that_does_not_fit_is_named():
    condition = random_condition(conditions=2).repeat(3)
    q = torch.zeros(8, 4, 2, 16)
    with pytest.raises(
        ValueError, match=r"batch has 8 pictures, but the condition serves 6 .* repeat\(4\) makes it fit"
    ):
        condition.attend(0, q)
    with pytest.raises(ValueError, match=r"batch has 7 pictures.* possible are multiples of 2"):
        condition.attend(0, q[:7])


def test_a_condition_of_another_model_is_named():
    condition = random_condition()
    condition.check_layers(condition.layers)
    with pytest.raises(ValueError, match=r"another model: it has 3 layers .* 2x16.* this model has 2 layers"):
        condition.check_layers(condition.layers[:2])
    with pytest.raises(ValueError, match="belongs to another model"):
        DreamCondition(torch.zeros(1, 4, 100), condition.layers)
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        condition.key_value(3)
    other = DreamCondition(torch.zeros(1, 6, 64), (ConditionLayer(1, 32),))
    with pytest.raises(ValueError, match="another model"):
        DreamCondition.concatenate(other, condition)


def test_conditions_that_cannot_be_concatenated_are_named():
    with pytest.raises(ValueError, match="conditions of 6 and 7 keys"):
        DreamCondition.concatenate(random_condition(), random_condition(keys=7))
    with pytest.raises(ValueError, match="2 x 1 and 3 x 1 pictures cannot be concatenated"):
        DreamCondition.concatenate(random_condition(2), random_condition(3))
    with pytest.raises(ValueError, match="2 x 2 and 2 x 3 pictures"):
        DreamCondition.concatenate(random_condition().repeat(2), random_condition().repeat(3))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        random_condition().repeat(0)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layers were given"),
        ([(torch.zeros(6, 4), torch.zeros(6, 4), 4)], "must both be"),
        ([(torch.zeros(6, 4), torch.zeros(8, 4), 2)], "must both be"),
        ([(torch.zeros(6, 4),) * 2 + (2,), (torch.zeros(6, 5),) * 2 + (2,)], "layer 1 takes conditions of width 5"),
        ([(torch.zeros(6, 4), torch.zeros(6, 4).half(), 2)], "bring the UNet to one dtype"),
    ],
)
def test_weights_that_do_not_fit_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        ConditionWeights.concatenate(layers)


@pytest.mark.parametrize(
    ("states", "projector", "message"),
    [
        (torch.zeros(4, WIDTH), None, "must be .conditions, keys, width"),
        (torch.zeros(1, 4, 96), None, "give a projector"),
        (torch.zeros(1, 4, 96), torch.zeros(WIDTH, 95), "does not take states of width 96"),
        (torch.zeros(1, 4, 96), torch.nn.Linear(96, 50), "belongs to another model"),
        (torch.zeros(1, 4, WIDTH, dtype=torch.bfloat16), None, "dtype torch.bfloat16 but the weights have"),
        (torch.zeros(1, 4, WIDTH, device="meta"), None, "condition is on meta"),
    ],
)
def test_states_that_do_not_fit_are_named(states, projector, message):
    with pytest.raises(ValueError, match=message):
        condition_kv(states, weights_of(attentions()), projector)
