"""Properties of the encoder that hold for any document, and its rules for documents that do not fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamllm.documents import (
    IGNORE_INDEX,
    PLAIN,
    Document,
    End,
    Picture,
    SequenceLayout,
    Text,
    conversation,
    encode_document,
    interleaved,
    original,
    pair,
)

LAYOUT = SequenceLayout(
    bos=1, eos=2, pad=90, im_start=91, im_patch=94, im_end=95, dream_start=93, dream_end=92,
    tokens_per_image=4, num_dream_queries=3, max_length=40, vocab_size=100,
)  # fmt: skip


def encode(text: str) -> list[int]:
    return [10 + ord(c) % 50 for c in text if c != " "]


texts = st.builds(Text, st.text("abcdef ", max_size=30), st.booleans())
pictures = st.builds(
    Picture, st.just(b""), comprehension=st.booleans(), creation=st.just(True), learn=st.booleans()
) | st.just(Picture(b"", comprehension=True))
documents = st.builds(
    Document,
    st.lists(texts | pictures, min_size=1, max_size=8).map(lambda parts: (*parts, End())),
    st.sampled_from(["stop", "cut"]),
)


@settings(max_examples=300, deadline=None)
@given(documents)
def test_every_encoding_is_well_formed(document):
    encoded = encode_document(document, LAYOUT, encode)
    assert len(encoded.input_ids) == len(encoded.labels) <= LAYOUT.max_length
    assert encoded.input_ids[0] == LAYOUT.bos
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert len(encoded.images) == len(encoded.image_starts) == encoded.input_ids.count(LAYOUT.im_start)
    assert len(encoded.targets) == len(encoded.dream_starts) == encoded.input_ids.count(LAYOUT.dream_start)
    for start in encoded.image_starts:
        assert encoded.input_ids[start - 1 : start + 5] == LAYOUT.image_ids()
    for start in encoded.dream_starts:
        assert encoded.input_ids[start - 1 : start + 4] == LAYOUT.dream_ids()
    patches = [i for i, token in enumerate(encoded.input_ids) if token == LAYOUT.im_patch]
    assert all(encoded.labels[i] == IGNORE_INDEX for i in patches)


@settings(max_examples=200, deadline=None)
@given(documents)
def test_truncation_keeps_a_prefix(document):
    """What fits is what a model with an endless context would have seen first."""
    encoded = encode_document(document, LAYOUT, encode)
    endless = SequenceLayout(**{**vars(LAYOUT), "max_length": 10_000})
    whole = encode_document(document, endless, encode)
    assert not whole.truncated
    kept = encoded.input_ids[:-1] if encoded.truncated and document.overflow == "stop" else encoded.input_ids
    assert whole.input_ids[: len(kept)] == kept
    assert encoded.truncated == (len(whole) > LAYOUT.max_length)


@pytest.mark.parametrize(("mode", "slots"), [("comprehension", 6), ("creation", 5)])
def test_long_caption_is_trimmed_around_the_picture(mode, slots):
    encoded = encode_document(pair(b"", "x" * 100, mode), LAYOUT, encode)
    assert len(encoded) == LAYOUT.max_length
    assert encoded.truncated
    assert encoded.input_ids[-1] == LAYOUT.eos
    assert encoded.input_ids.count(encode("x")[0]) == LAYOUT.max_length - slots - 2


def test_interleaved_document_stops_before_what_does_not_fit():
    encoded = encode_document(interleaved(["a" * 10, "b" * 10, "c" * 30], [(0, b"0"), (1, b"1")]), LAYOUT, encode)
    assert encoded.images == [b"0"]
    assert encoded.input_ids[-1] == LAYOUT.eos
    assert encode("c")[0] not in encoded.input_ids


def test_conversation_keeps_everything_before_a_picture_that_does_not_fit():
    """The original keeps only the first (max_length - position) ids there (spec B.5)."""
    turns = [("user", "a" * 15 + "<image>"), ("assistant", "b")]
    ours = encode_document(conversation(turns, [b""], PLAIN), LAYOUT, encode)
    question = encode("USER: " + "a" * 15)
    assert ours.input_ids[: 1 + len(question)] == [1, *question]
    long = [("user", "a" * 29 + "<image>"), ("assistant", "b")]
    position = 1 + len(encode("USER: " + "a" * 29))
    assert position + LAYOUT.image_length > LAYOUT.max_length
    assert len(encode_document(conversation(long, [b""], PLAIN), LAYOUT, encode)) == position
    theirs = original.encode_conversation(long, [b""], PLAIN, LAYOUT, encode)
    assert len(theirs) == LAYOUT.max_length - position
    assert theirs.images == []


def test_prompt_that_does_not_fit_says_by_how_much():
    document = Document((Text("a" * 60),), "error", "prompt")
    with pytest.raises(ValueError, match="document prompt needs 61 tokens, 21 more than the context of 40"):
        encode_document(document, LAYOUT, encode)


def test_pictures_alone_may_be_too_long_for_a_pair():
    document = Document((*[Picture(b"", comprehension=True)] * 8, Text("a"), End()), "trim", "album")
    with pytest.raises(ValueError, match="pictures of document album alone exceed the context of 40 tokens by 10"):
        encode_document(document, LAYOUT, encode)
