"""Recording where the dream queries act changes nothing and records the truth."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from transformers import LlamaForCausalLM

from dreamllm.documents import Document, Picture, Text
from dreamllm.evaluation.attention import (
    CrossAttentionRecorder,
    dream_attention,
    reading_attention,
    recorded_attention,
)
from dreamllm.inference import DrawingOptions, Engine, draw
from tests.tiny import NUM_QUERIES, random_picture, tiny_model

DRAWING = DrawingOptions(steps=3, guidance_scale=2.0, scheduler="ddim")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(*tiny_model(tmp_path_factory.mktemp("tiny")))


def test_the_recorder_computes_the_attention_and_records_its_probabilities():
    torch.manual_seed(0)
    attention = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    positions, condition = torch.randn(3, 16, 8), torch.randn(3, 5, 6)
    expected = attention(positions, condition)
    recorder = CrossAttentionRecorder(count=2, size=(4, 4))
    attention.set_processor(recorder)
    torch.testing.assert_close(attention(positions, condition), expected, rtol=1e-5, atol=1e-6)
    q = attention.to_q(positions).view(3, 16, 2, 4)
    k = attention.to_k(condition).view(3, 5, 2, 4)
    probabilities = (torch.einsum("bnhd,bqhd->bhnq", q, k) / 2.0).softmax(-1).mean(1)
    maps = recorder.maps()
    assert maps.shape == (2, 5, 4, 4)
    torch.testing.assert_close(maps.flatten(2), probabilities[1:].transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_recorded_pictures_are_those_drawn_otherwise(engine):
    prompts = [Document((Text(text),)) for text in ("a license", "the copy")]
    pictures, maps = dream_attention(engine, prompts, DRAWING, [3, 4])
    expected = draw(engine.model, engine.conditions(prompts), engine.null_condition(), DRAWING, [3, 4])
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    assert maps.shape == (2, NUM_QUERIES, 8, 8)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 8, 8))
    assert not torch.allclose(maps[0], maps[1])


def test_maps_are_of_the_guided_half(engine):
    """The unguided half of the batch, whatever the negative prompt, leaves no trace at the first step."""
    prompts = [Document((Text("a license"),))]
    one_step = DrawingOptions(steps=1, guidance_scale=2.0, scheduler="ddim")
    _, maps = dream_attention(engine, prompts, one_step, [0])
    other = DrawingOptions(steps=1, guidance_scale=2.0, scheduler="ddim", negative_prompt="the copy of the work")
    torch.testing.assert_close(dream_attention(engine, prompts, other, [0])[1], maps)


def test_the_unet_is_as_before_even_after_an_error(engine):
    before = dict(engine.model.unet.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), recorded_attention(engine.model.unet, 1, (8, 8)):
        raise RuntimeError("stop")
    assert engine.model.unet.attn_processors == before


def test_nothing_drawn_is_an_error(engine):
    with recorded_attention(engine.model.unet, 1, (8, 8)) as recorder, pytest.raises(ValueError, match="nothing was"):
        recorder.maps()


def test_reading_attention_is_that_of_transformers(engine):
    """Of a stock LLaMA with the same weights, whose eager attention returns its probabilities."""
    model, layout = engine.model, engine.layout
    pictures = [random_picture(1), random_picture(2)]
    parts = [Text("The "), *(Picture(picture, comprehension=True) for picture in pictures), Text(" license")]
    document = Document(tuple(parts), "error")
    ids = torch.tensor([*engine.processor.encode(document).input_ids, *layout.dream_ids()])
    patches = (ids == layout.im_patch).nonzero().flatten()
    read, queries = patches[:-NUM_QUERIES].view(2, -1), patches[-NUM_QUERIES:]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        embeds[read] = model.encode_images(engine.processor.vision(pictures))
        embeds[queries] = model.dream_queries
        config = copy.deepcopy(model.config.text_config)
        stock = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
        stock.load_state_dict(model.language_model.state_dict())
        found = torch.cat(stock.model(inputs_embeds=embeds[None], output_attentions=True).attentions)
    expected = found.mean((0, 1))[queries][:, read]
    maps = reading_attention(engine, document)
    torch.testing.assert_close(maps.flatten(2), expected.transpose(0, 1), rtol=1e-4, atol=1e-6)


def test_a_prompt_without_pictures_is_not_read_so(engine):
    with pytest.raises(ValueError, match="has no picture that dream queries could look at"):
        reading_attention(engine, Document((Text("a license"),)))
