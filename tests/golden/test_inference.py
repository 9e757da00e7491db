"""The original program's conditions, its picture of ten DDIM steps and its greedy text, through our engine."""

import pytest

from dreamllm.documents import Document, Picture, Text
from dreamllm.inference import DrawingOptions, Engine, GenerationOptions, draw
from dreamllm.model import load_original
from tests.golden import reference
from tests.tiny import random_picture


@pytest.fixture(scope="module")
def golden():
    return load_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION)


def assert_close(ours, name):
    expected = reference.array(name)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_states_at_the_dream_queries_after_a_prompt(golden):
    assert_close(Engine(*golden).dream_states([Document((Text("A photo of the license"),))]), "prompt_embeds")


def test_states_at_the_dream_queries_after_the_empty_prompt(golden):
    assert_close(Engine(*golden).null_states()[None], "negative_embeds")


def test_ten_guided_ddim_steps(golden):
    model, _ = golden
    condition = model.project_condition(reference.array("prompt_embeds"))
    null = model.project_condition(reference.array("negative_embeds"))[0]
    options = DrawingOptions(steps=10, guidance_scale=3.5, scheduler="ddim")
    picture = draw(model, condition, null, options, [0], reference.array("init_latents"))
    assert (picture.permute(0, 2, 3, 1) - reference.array("ddim10_image")).abs().max() < 1e-3


def test_greedy_continuation(golden, monkeypatch):
    model, processor = golden
    ids, expected = reference.array("gen_prompt")[0].tolist(), reference.array("gen_ids")[0].tolist()
    after_picture = ids.index(processor.layout.im_end) + 1
    assert ids[:2] == [processor.layout.bos, processor.layout.im_start]
    monkeypatch.setattr(processor, "vision", lambda images: reference.array("images")[:1])
    monkeypatch.setattr(processor, "encode_text", lambda text: ids[after_picture:])
    start = Document((Picture(random_picture(0), comprehension=True), Text("the recorded ids")))
    options = GenerationOptions(max_new_tokens=len(expected) - len(ids), pictures="forbid")
    assert list(Engine(model, processor).answer(start, options).token_ids) == expected[len(ids) :]
