"""Digits: what is written about them, and the components that DreamLLM starts from."""

import json
import random
import re

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPVisionModel, LlamaForCausalLM, LlamaTokenizer

from dreamllm.evaluation.digits import WORDS, names_only
from dreamllm.evaluation.digits_scans import load_scans
from dreamllm.model import AssembleOptions, assemble
from dreamllm.model.processor import CLIPImageProcessorPil
from dreamllm.recipes.digits import components as made
from dreamllm.recipes.digits.components import ComponentConfig, LanguageModelConfig, pretrain_components
from dreamllm.recipes.digits.data import (
    caption,
    corpus,
    counting_request,
    counting_run,
    drawing_turn,
    reading_turn,
    vocabulary_texts,
)

CONFIG = ComponentConfig(language=LanguageModelConfig(texts=2000), seed=3, scale=0.003)


@pytest.fixture(scope="module")
def scans():
    return load_scans()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("components")
    pretrain_components(target, CONFIG)
    return target


# -- data ---------------------------------------------------------------------


def test_the_last_297_scans_are_set_apart(scans):
    train, unseen = scans
    assert (len(train), len(unseen)) == (1500, 297)
    assert set(unseen.labels.tolist()) == set(range(10))
    assert all((train.labels[train.of(n)] == n).all() for n in range(10))
    assert train.pictures.dtype == np.uint8
    assert train.pictures.max() == 255


@pytest.mark.parametrize("number", range(10))
def test_captions_and_turns_name_their_number_and_no_other(number):
    rng = random.Random(number)
    for _ in range(20):
        question, answer = reading_turn(number, rng)
        request, reply = drawing_turn(number, rng)
        assert all(names_only(text, number) for text in (caption(number, rng), answer, request, reply))
        assert not any(word in question for word in WORDS)


def test_the_article_of_eight_is_an():
    texts = [text for text in vocabulary_texts(made.as_dialogue) if re.search(r"\ban?\b \w+", text)]
    assert any("an eight" in text for text in texts)
    assert not any("a eight" in text or "an seven" in text for text in texts)


def test_the_corpus_is_a_function_of_its_seed():
    first = corpus(300, 1, made.as_dialogue)
    assert first == corpus(300, 1, made.as_dialogue)
    assert first != corpus(300, 2, made.as_dialogue)


def test_counting_in_the_corpus_is_right():
    pattern = re.compile(r"Count from (\w+) to (\w+)\b.* ASSISTANT: (.*)")
    found = [match for text in corpus(3000, 0, made.as_dialogue) if (match := pattern.search(text))]
    assert len(found) > 300
    for first, last, body in (match.groups() for match in found):
        words = [word for word in body.split() if word in WORDS]
        assert words == list(WORDS[WORDS.index(first) : WORDS.index(last) + 1])


def test_runs_are_consecutive_and_leave_something_to_count():
    rng = random.Random(0)
    runs = [counting_run(rng) for _ in range(500)]
    assert {len(run.numbers) for run in runs} == {2, 3, 4}
    assert all(run.numbers[0] >= 0 and run.numbers[-1] <= 9 and len(run.numbers) > run.given for run in runs)
    assert {(run.given, run.named) for run in runs} == {(0, True), (2, True), (2, False)}


def test_after_two_pictures_counting_mostly_goes_on():
    rng = random.Random(0)
    runs = [run for run in (counting_run(rng) for _ in range(2000)) if not run.given and run.numbers[1] < 9]
    assert sum(len(run.numbers) > 2 for run in runs) > 0.7 * len(runs)


# -- components ---------------------------------------------------------------


def test_the_folders_load_with_the_libraries_own_loaders(folder):
    llm = LlamaForCausalLM.from_pretrained(folder / "llm")
    tokenizer = LlamaTokenizer.from_pretrained(folder / "llm")
    assert llm.get_input_embeddings().weight.shape[0] == len(tokenizer)
    clip = CLIPVisionModel.from_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    pixels = processor(np.zeros((8, 8, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    assert clip(pixels).last_hidden_state.shape == (1, 17, 64)
    unet = UNet2DConditionModel.from_pretrained(folder / "diffusion/unet")
    assert unet(torch.zeros(1, 1, 8, 8), 3, torch.zeros(1, 4, 64)).sample.shape == (1, 1, 8, 8)
    assert DDPMScheduler.from_pretrained(folder / "diffusion/scheduler").config.prediction_type == "v_prediction"


def test_the_codec_is_the_identity(folder):
    assert json.loads((folder / "diffusion/model_index.json").read_text()) == {"codec": "identity"}
    assert not (folder / "diffusion/vae").exists()


def test_they_assemble_to_a_dreamllm(folder):
    options = AssembleOptions(num_dream_queries=4, template="plain")
    model, _ = assemble(folder / "llm", folder / "clip", folder / "diffusion", options)
    assert (model.config.tokens_per_image, model.config.picture_size, model.config.picture_channels) == (16, 8, 1)


@pytest.mark.parametrize("text", ["a seven", "USER: Draw an eight. ASSISTANT:", "naïve 7 ≠ 8"])
def test_the_tokenizer_gives_any_text_back(folder, text):
    tokenizer = LlamaTokenizer.from_pretrained(folder / "llm")
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_word_of_the_recipe_is_one_token(folder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "llm/tokenizer.model"))
    assert all(len(pieces.encode(word)) == 1 for word in WORDS)
    request = counting_request(2, 5)
    assert len(pieces.encode(request)) == len(re.findall(r"\w+|[^\w\s]", request))


def test_training_pictures_look_as_the_image_processor_makes_them(scans):
    train, _ = scans
    vision = CONFIG.vision
    pictures = train.pictures[:32]
    ours = made.to_pixel_values(made.ink_of(train)[:32], vision.image_size)
    rgb = [np.repeat(picture[:, :, None], 3, axis=2) for picture in pictures]
    theirs = vision.image_processor()(rgb, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3 / 255)  # the processor rounds to eight bits


def test_augmentation_keeps_the_range_and_is_seeded(scans):
    ink = made.ink_of(scans[0])[:64]
    config = CONFIG.vision.augmentation
    first, again = (made.augment(ink, config, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0
    assert first.max() <= 1
    assert not torch.equal(first, ink)


def test_equal_seeds_give_equal_weights(folder, tmp_path):
    torch.manual_seed(1234)  # the state of the global generator must not matter
    pretrain_components(tmp_path, CONFIG)
    written = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(written) == 12
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in written)


def test_other_seeds_give_other_weights(folder, tmp_path):
    train, _ = load_scans()
    made.make_denoiser(tmp_path / "diffusion", train, ComponentConfig(seed=4, scale=0.003))
    name = "diffusion/unet/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() != (tmp_path / name).read_bytes()


def test_what_is_there_is_kept(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    report = pretrain_components(folder, CONFIG)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert set(report.parts) == {"llm", "clip", "diffusion"}


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="scale must be positive"):
        ComponentConfig(scale=0)
