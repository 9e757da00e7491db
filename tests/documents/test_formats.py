"""The worked examples of the spec (B.7) and the kinds of document around them."""

import pytest

from dreamllm.documents import (
    IGNORE_INDEX,
    PLAIN,
    VICUNA_V1_1,
    Document,
    End,
    Picture,
    SequenceLayout,
    Text,
    chat_template,
    conversation,
    encode_document,
    instruction_interleaved,
    interleaved,
    pair,
    prompt,
)

RELEASED = SequenceLayout(
    bos=1, eos=2, pad=32000, im_start=32001, im_patch=32004, im_end=32005, dream_start=32003, dream_end=32002,
    tokens_per_image=256, num_dream_queries=64, max_length=2048, vocab_size=32008,
)  # fmt: skip


def encode(text: str) -> list[int]:
    """One id per word, so that expectations can be written down."""
    return [100 + len(word) for word in text.split()]


def test_comprehension_pair_as_in_the_spec():
    encoded = encode_document(pair(b"", "a bb ccc", "comprehension"), RELEASED, encode)
    caption = [101, 102, 103]
    assert len(encoded) == 3 + 260
    assert encoded.input_ids == [1, 32001, *[32004] * 256, 32005, *caption, 2]
    assert encoded.labels == [1, *[IGNORE_INDEX] * 258, *caption, 2]
    assert encoded.image_starts == [2]


def test_creation_pair_as_in_the_spec():
    encoded = encode_document(pair(b"", "a bb ccc", "creation"), RELEASED, encode)
    n = 3
    assert len(encoded) == n + 68
    assert encoded.input_ids[n + 1] == 32003
    assert encoded.input_ids[n + 2 : n + 66] == [32004] * 64
    assert encoded.input_ids[n + 66 :] == [32002, 2]
    assert set(encoded.labels) == {IGNORE_INDEX}
    assert encoded.dream_starts == [n + 2]


def test_interleaved_document_as_in_the_spec():
    document = interleaved(["one two", "three"], [(0, b"")])
    encoded = encode_document(document, RELEASED, encode)
    a, b = 2, 1
    assert len(encoded) == 1 + a + 66 + 258 + b + 1
    assert encoded.labels[a + 1] == encoded.input_ids[a + 1] == 32003
    assert set(encoded.labels[a + 2 : a + 325]) == {IGNORE_INDEX}
    assert encoded.input_ids[a + 67] == 32001
    assert encoded.input_ids[a + 324] == 32005
    assert encoded.labels[a + 325] == 105
    assert encoded.dream_starts == [a + 2]
    assert encoded.image_starts == [a + 68]


@pytest.mark.parametrize(("mode", "slots"), [("joint", 66 + 258), ("comprehension", 258), ("creation", 66)])
def test_interleaved_modes(mode, slots):
    encoded = encode_document(interleaved(["one"], [(0, b"")], mode), RELEASED, encode)
    assert len(encoded) == 1 + 1 + slots + 1


def test_pictures_on_one_text_stand_side_by_side_in_their_order():
    document = interleaved(["a", "b"], [(1, b"2"), (0, b"0"), (1, b"3")])
    assert [p.source for p in document.pictures()] == [b"0", b"2", b"3"]
    kinds = [type(part) for part in document.parts]
    assert kinds == [Text, Picture, Text, Picture, Picture, End]


def test_instruction_is_not_learned_but_its_answer_is():
    document = instruction_interleaved("Write.", ["one"], [(0, b"")], PLAIN)
    encoded = encode_document(document, RELEASED, encode)
    prompt_length = len(encode("USER: Write. ASSISTANT:"))
    assert set(encoded.labels[: 1 + prompt_length]) == {IGNORE_INDEX}
    assert encoded.labels[1 + prompt_length : 3 + prompt_length] == [103, 32003]
    assert encoded.labels[-1] == 2


def test_conversation_learns_answers_and_their_ends():
    turns = [("user", "<image> What"), ("assistant", "Fox"), ("user", "Draw"), ("assistant", "Here <dream>")]
    encoded = encode_document(conversation(turns, [b"in", b"out"], PLAIN), RELEASED, encode)
    learned = [t for t, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert learned == [103, 2, 104, 2]
    assert encoded.images == [b"in", b"out"]
    assert encoded.targets == [b"out"]


def test_conversation_can_learn_the_decision_to_draw():
    turns = [("user", "Draw"), ("assistant", "Here <dream>")]
    encoded = encode_document(conversation(turns, [b""], PLAIN, learn_dream=True), RELEASED, encode)
    learned = [t for t, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert learned == [104, 32003, 2]


def test_system_sentence_opens_the_first_turn_only():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    text = conversation(turns, [], VICUNA_V1_1).text()
    assert text.count(VICUNA_V1_1.system) == 1
    assert text.startswith(VICUNA_V1_1.system + " USER: a ASSISTANT:")


# -- wrong input -----------------------------------------------------------


@pytest.mark.parametrize("caption", ["", "   ", "\n\t"])
@pytest.mark.parametrize("mode", ["comprehension", "creation"])
def test_empty_caption(caption, mode):
    with pytest.raises(ValueError, match="pair shard 3/7 has an empty caption"):
        pair(b"", caption, mode, name="shard 3/7")


def test_roles_must_alternate():
    with pytest.raises(ValueError, match="turn 1 is from 'user'"):
        conversation([("user", "a"), ("user", "b")], [], PLAIN)
    with pytest.raises(ValueError, match="no turns"):
        conversation([], [], PLAIN)


@pytest.mark.parametrize("pictures", [0, 2])
def test_placeholders_must_match_pictures(pictures):
    with pytest.raises(ValueError, match=f"1 <image>/<dream> placeholders but {pictures} pictures"):
        conversation([("user", "<image>"), ("assistant", "b")], [b""] * pictures, PLAIN)


@pytest.mark.parametrize("index", [-1, 2])
def test_picture_matched_outside_the_texts(index):
    with pytest.raises(ValueError, match=f"matched with text {index}, but there are only 2 texts"):
        interleaved(["a", "b"], [(index, b"")])


def test_unknown_names():
    with pytest.raises(ValueError, match="mode 'both' is unknown"):
        interleaved(["a"], [], "both")
    with pytest.raises(ValueError, match="mode 'joint' is unknown for a pair"):
        pair(b"", "a", "joint")
    with pytest.raises(ValueError, match="unknown chat template 'llama9'; known: plain"):
        chat_template("llama9")


def test_picture_without_a_use():
    with pytest.raises(ValueError, match="comprehension, creation or both"):
        Picture(b"")


def test_prompt_placeholders():
    assert [type(p) for p in prompt("see <image>, say", [b""]).parts] == [Text, Picture, Text]
    assert encode_document(prompt(""), RELEASED, encode).input_ids == [1]
    with pytest.raises(ValueError, match="0 <image> placeholders but 1 pictures"):
        prompt("no place", [b""])


def test_document_without_parts():
    with pytest.raises(ValueError, match=r"document empty\.txt has no parts"):
        encode_document(Document((), name="empty.txt"), RELEASED, encode)


def test_context_too_short_for_a_picture():
    with pytest.raises(ValueError, match="max_length 100 cannot hold one picture: 260 tokens"):
        SequenceLayout(1, 2, 3, 4, 5, 6, 7, 8, 256, 64, 100, 32008)
