"""transformers models with attn_implementation="dreamkernels", beside the same weights with "sdpa" and "eager"."""

import warnings

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from dreamkernels.integrations import transformers_attention
from dreamkernels.integrations.transformers_attention import no_mask, register
from dreamkernels.ops.operator import FallbackWarning
from dreamkernels.testing import assert_within_eager_error

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def loud():
    """A fallback is an error unless the test expects it."""
    transformers_attention._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def with_ours(model):
    model.set_attn_implementation(register())
    return model


def outputs_and_gradients(model, batches):
    """Of several batches: the largest error in one small tensor is luck."""
    found = []
    for inputs in batches:
        model.zero_grad()
        out = model(**inputs)[0]
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return [torch.stack(tensors) for tensors in zip(*found, strict=True)]


def text():
    return torch.randint(1, 99, (2, 30))


MODELS = {
    "llama": (llama, lambda: {"input_ids": text(), "use_cache": False}),
    "clip text": (
        lambda: CLIPTextModel(CLIPTextConfig(**SIZES)).eval(),
        lambda: {"input_ids": text()},
    ),
    "clip vision": (
        lambda: CLIPVisionModel(
            CLIPVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
        ).eval(),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_as_exact_as_eager(name):
    make, make_inputs = MODELS[name]
    model, batches = make(), [make_inputs() for _ in range(6)]
    model.set_attn_implementation("eager")
    eager = outputs_and_gradients(model, batches)
    ours = outputs_and_gradients(with_ours(model), batches)
    model.set_attn_implementation("eager")
    for batch in batches:
        batch.update({key: t.double() for key, t in batch.items() if torch.is_tensor(t) and t.is_floating_point()})
    exact = outputs_and_gradients(model.double(), batches)
    for k, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_eager_error(mine, theirs, truth, what=f"tensor {k}")


def test_generation_chooses_the_same_tokens():
    model, ids = llama(), torch.randint(1, 99, (2, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(with_ours(model).generate(ids, **options), expected)


def test_more_tokens_over_a_cache_see_all_of_it():
    """Several new tokens against cached ones: causal, aligned at the end, without a mask."""
    model = with_ours(llama())
    ids = torch.randint(1, 99, (2, 20))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :13], use_cache=True)
        rest = model(ids[:, 13:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 13:])


def test_packed_sequences_do_not_see_each_other():
    model = with_ours(llama())
    lengths = (7, 20, 1)
    ids = [torch.randint(1, 99, (n,)) for n in lengths]
    cu_seqlens = torch.tensor([0, 7, 27, 28], dtype=torch.int32)
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            attention_mask=no_mask(ids[0]),
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=20,
            max_length_k=20,
        ).logits[0]
        for part, alone in zip(packed.split(lengths), ids, strict=True):
            torch.testing.assert_close(part, model(alone[None]).logits[0])


def test_packed_sequences_told_by_positions_alone_are_masked():
    """Without cu_seq_lens transformers makes a block-diagonal mask, which is obeyed (and warned of)."""
    model = llama()
    ids = torch.randint(1, 99, (1, 20))
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        with pytest.warns(FallbackWarning, match="neither causal nor full"):
            found = with_ours(model)(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_warned_of_once(side):
    model, ids = llama(), torch.randint(1, 99, (2, 15))
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(11, 15)] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with pytest.warns(FallbackWarning) as caught:
            found = with_ours(model)(ids, attention_mask=mask).logits
    assert len(caught) == 1
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_a_static_cache_is_obeyed():
    model, ids = llama(), torch.randint(1, 99, (1, 9))
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with pytest.warns(FallbackWarning, match="static cache"):
        assert torch.equal(with_ours(model).generate(ids, **options), expected)


def test_a_sliding_window_is_obeyed():
    model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)).eval()
    ids = torch.randint(1, 99, (1, 24))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with pytest.warns(FallbackWarning):
            found = with_ours(model)(ids, use_cache=False).logits
        short = with_ours(model)(ids[:, :5], use_cache=False).logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(short, expected[:, :5])


def test_dropout_is_not_lost():
    config = LlamaConfig(**SIZES, num_key_value_heads=2, attention_dropout=0.5)
    model, ids = with_ours(LlamaForCausalLM(config).train()), torch.randint(1, 99, (1, 9))
    with pytest.warns(FallbackWarning, match=r"dropout of the attention weights is 0\.5"):
        first, second = (model(ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 9, "max_length_k": 9}
    with pytest.raises(ValueError, match=r"packed sequences cannot run .* dropout"):
        model(ids, attention_mask=no_mask(ids), use_cache=False, **lengths)
    with pytest.raises(ValueError, match="one row; the batch has 2"):
        model.eval()(ids.expand(2, -1), attention_mask=no_mask(ids), use_cache=False, **lengths)
