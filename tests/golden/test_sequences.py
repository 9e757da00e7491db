"""Ids and labels of the original's sequence builder, all 21 samples."""

import pytest
from PIL import Image
from sentencepiece import SentencePieceProcessor

from dreamllm.documents import (
    IGNORE_INDEX,
    VICUNA_V1_1,
    EncodedDocument,
    SequenceLayout,
    conversation,
    encode_document,
    instruction_interleaved,
    interleaved,
    original,
    pair,
)
from dreamllm.model.processor import load_tokenizer, read_sentencepiece, special_token_ids
from tests.golden import reference

PICTURE = Image.new("RGB", (8, 8))
SAMPLES = reference.samples()
NAMES = [f"{i}-{s['kind']}-{s['mode']}" for i, s in enumerate(SAMPLES)]


@pytest.fixture(scope="module")
def encode():
    return SentencePieceProcessor(model_proto=read_sentencepiece(reference.CHECKPOINT)).encode


@pytest.fixture(scope="module")
def layout():
    ids = special_token_ids(load_tokenizer(reference.CHECKPOINT))
    return SequenceLayout(**ids, **reference.sequence_settings(), vocab_size=808)


def build(sample: dict, layout: SequenceLayout, encode, compat: str) -> EncodedDocument:
    kind, mode = sample["kind"], sample["mode"]
    if kind == "image_text_pair":
        return encode_document(pair(PICTURE, sample["caption"], mode), layout, encode)
    if kind == "conversation":
        turns = [tuple(turn) for turn in sample["dialog"]]
        pictures = [PICTURE] * sum(text.count("<image>") + text.count("<dream>") for _, text in turns)
        if compat == "original":
            return original.encode_conversation(turns, pictures, VICUNA_V1_1, layout, encode)
        return encode_document(conversation(turns, pictures, VICUNA_V1_1), layout, encode)
    pictures = [(index, PICTURE) for index in sample["matched_text_index"]]
    if kind == "interleaved":
        return encode_document(interleaved(sample["text_list"], pictures, mode), layout, encode)
    make = original.instruction_interleaved if compat == "original" else instruction_interleaved
    document = make(sample["instruction"], sample["text_list"], pictures, VICUNA_V1_1, mode)
    return encode_document(document, layout, encode)


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_original_compat_reproduces_every_id_and_label(sample, layout, encode):
    encoded = build(sample, layout, encode, "original")
    assert encoded.input_ids == sample["input_ids"]
    assert encoded.labels == sample["labels"]
    assert len(encoded.images) == sample["num_images"]
    assert len(encoded.targets) == sample["num_target_images"]


DEFECTIVE = {"conversation", "instruct_interleaved"}


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_default_differs_only_where_the_original_is_defective(sample, layout, encode):
    encoded = build(sample, layout, encode, "default")
    if sample["kind"] not in DEFECTIVE:
        assert (encoded.input_ids, encoded.labels) == (sample["input_ids"], sample["labels"])
    elif sample["kind"] == "conversation":
        assert encoded.input_ids == sample["input_ids"]
        colon = encode("ASSISTANT:")[-1]
        changed = [
            i for i, (ours, theirs) in enumerate(zip(encoded.labels, sample["labels"], strict=True)) if ours != theirs
        ]
        assert changed
        assert all(sample["input_ids"][i] == colon and encoded.labels[i] == IGNORE_INDEX for i in changed)
    else:
        prompt = encode(f"{VICUNA_V1_1.system} USER: {sample['instruction']} ASSISTANT:")
        assert encoded.input_ids[1 : 1 + len(prompt)] == prompt
        assert set(encoded.labels[: 1 + len(prompt)]) == {IGNORE_INDEX}


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_slots_stand_where_their_markers_are(sample, layout, encode):
    encoded = build(sample, layout, encode, "default")
    for start in encoded.image_starts:
        assert encoded.input_ids[start - 1] == layout.im_start
        assert encoded.input_ids[start + layout.tokens_per_image] == layout.im_end
    for start in encoded.dream_starts:
        assert encoded.input_ids[start - 1] == layout.dream_start
        assert encoded.input_ids[start + layout.num_dream_queries] == layout.dream_end
