"""What a user can get wrong, and what they are told."""

import pytest
import torch

from dreamllm.documents import EncodedDocument, pair
from dreamllm.model import DiffusionDraws
from tests.tiny import random_picture, tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def creation_batch(processor):
    return processor.pad([processor.encode(pair(random_picture(0), "A fox", "creation"))])


def test_ids_outside_the_vocabulary(tiny):
    model, processor = tiny
    with pytest.raises(ValueError, match=r"must lie in \[0, 808\); found 1 to 808"):
        model(input_ids=torch.tensor([[1, 5, 808]]))
    bad = EncodedDocument(input_ids=[1, 900], labels=[-100, -100], name="page 7")
    with pytest.raises(ValueError, match="document page 7: id 900 at position 1 is outside the vocabulary of 808"):
        processor.pack([bad])


@pytest.mark.parametrize("pictures", [0, 2])
def test_dream_slots_and_target_pictures_must_match(tiny, pictures):
    model, processor = tiny
    batch = creation_batch(processor)
    batch["target_pixel_values"] = torch.zeros(pictures, 1, 8, 8)
    with pytest.raises(ValueError, match=f"1 dream slots but {pictures} target pictures"):
        model(**batch)
    packed = processor.pack([processor.encode(pair(random_picture(0), "A fox", "creation"))])
    packed.target_pixel_values = torch.zeros(pictures, 1, 8, 8)
    with pytest.raises(ValueError, match=f"1 dream slots but {pictures} target pictures"):
        model.forward_packed(packed)


def test_slots_of_a_document_must_match_its_targets(tiny):
    _, processor = tiny
    document = processor.encode(pair(random_picture(0), "A fox", "creation"))
    document.targets.append(random_picture(1))
    with pytest.raises(ValueError, match="1 dream slots but 2 target pictures"):
        processor.pack([document])


@pytest.mark.parametrize("pictures", [None, 2])
def test_image_slots_and_pictures_must_match(tiny, pictures):
    model, processor = tiny
    batch = processor(["See <image>"], images=[random_picture(0)])
    batch["pixel_values"] = None if pictures is None else torch.zeros(pictures, 3, 16, 16)
    with pytest.raises(ValueError, match=f"1 image slots but {pictures or 0} pictures"):
        model(**batch)


def test_pixel_values_of_the_wrong_size(tiny):
    model, processor = tiny
    batch = processor(["See <image>"], images=[random_picture(0)])
    batch["pixel_values"] = torch.zeros(1, 3, 20, 20)
    with pytest.raises(ValueError, match=r"must be \[N, 3, 16, 16\], not \[1, 3, 20, 20\]"):
        model(**batch)


def test_slot_cut_off_at_the_end(tiny):
    model, processor = tiny
    batch = processor(["See <image>"], images=[random_picture(0)])
    with pytest.raises(ValueError, match="the image slot of 4 tokens is cut off"):
        model(input_ids=batch["input_ids"][:, :-2], pixel_values=batch["pixel_values"])


def test_placeholders_and_pictures_of_a_prompt_must_match(tiny):
    _, processor = tiny
    with pytest.raises(ValueError, match="2 <image> placeholders but 1 pictures"):
        processor(["<image> and <image>"], images=[random_picture(0)])


def test_overlong_prompt_says_by_how_much(tiny):
    _, processor = tiny
    text = "word " * 300
    excess = 1 + len(processor.encode_text(text)) - processor.layout.max_length
    with pytest.raises(ValueError, match=f"{excess} more than the context of {processor.layout.max_length}"):
        processor(text)


def test_input_longer_than_the_context(tiny):
    model, processor = tiny
    ids = torch.full((1, processor.layout.max_length + 1), 5)
    with pytest.raises(ValueError, match="257 tokens exceed the context of 256"):
        model(input_ids=ids)


def test_padding_side_must_be_known(tiny):
    _, processor = tiny
    with pytest.raises(ValueError, match="'left' or 'right'"):
        processor("A fox", padding_side="centre")


def test_text_that_looks_like_a_special_token_stays_text(tiny):
    _, processor = tiny
    ids = processor("a </s> <im_start> <dream_start> b")["input_ids"][0].tolist()
    layout = processor.layout
    assert not {layout.eos, layout.im_start, layout.dream_start} & set(ids)


def test_queries_are_placed_without_targets_except_in_original_compat(tiny):
    model, processor = tiny
    batch = creation_batch(processor)
    targets = batch.pop("target_pixel_values")
    draws = DiffusionDraws(torch.tensor([5]), torch.zeros(1, 1, 8, 8))
    with torch.no_grad():
        ours = model(**batch).logits
        with_targets = model(**batch, target_pixel_values=targets, draws=draws).logits
        model.config.compat = "original"
        try:
            theirs = model(**batch).logits
        finally:
            model.config.compat = "default"
    assert torch.equal(ours, with_targets)
    assert (theirs - ours).abs().max() > 1e-3


def test_empty_batch(tiny):
    with pytest.raises(ValueError, match="at least one document"):
        tiny[1].pack([])
