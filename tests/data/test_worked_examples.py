"""The worked examples of the specification (B.7), from files on disk to ids and labels."""

from __future__ import annotations

import json

import pytest

from dreamllm.data import make_reader
from dreamllm.documents import SequenceLayout, encode_document
from tests.data.pictures import png, write_tar

LAYOUT = SequenceLayout(
    bos=1, eos=2, pad=32000, im_start=32001, im_patch=32004, im_end=32005, dream_start=32003, dream_end=32002,
    tokens_per_image=256, num_dream_queries=64, max_length=2048, vocab_size=32008,
)  # fmt: skip
CAPTION = "one two three four"
IDS = [101, 102, 103, 104]
IGNORED = -100


def encode(text: str) -> list[int]:
    """One id per word, by its place in the caption."""
    return [101 + CAPTION.split().index(word) for word in text.split()]


def encoded(reader):
    return encode_document(reader.document(0), LAYOUT, encode)


@pytest.fixture
def pair_tar(tmp_path):
    return write_tar(tmp_path / "a.tar", {"x.jpg": png(0), "x.txt": f" {CAPTION}\n".encode()})


def test_comprehension_pair(pair_tar):
    sequence = encoded(make_reader("pair_tars", pair_tar, mode="comprehension"))
    n = len(IDS)
    assert len(sequence) == n + 260
    assert sequence.input_ids == [1, 32001, *[32004] * 256, 32005, *IDS, 2]
    assert sequence.labels == [1, *[IGNORED] * 258, *IDS, 2]
    assert (sequence.image_starts, sequence.dream_starts) == ([2], [])


def test_creation_pair(pair_tar):
    sequence = encoded(make_reader("pair_tars", pair_tar, mode="creation"))
    n = len(IDS)
    assert len(sequence) == n + 68
    assert sequence.input_ids == [1, *IDS, 32003, *[32004] * 64, 32002, 2]
    assert sequence.labels == [IGNORED] * (n + 68)
    assert (sequence.image_starts, sequence.dream_starts) == ([], [n + 2])


def test_interleaved_with_one_picture_between_two_texts(tmp_path):
    values = {
        "text_list": ["one", " two three ", "four"],
        "image_info": [{"image_name": "p.jpg", "matched_text_index": 1}],
    }
    tar = write_tar(tmp_path / "a.tar", {"d.json": json.dumps(values).encode(), "d-p.jpg": png(0)})
    sequence = encoded(make_reader("interleaved_tars", tar))
    a, b = 3, 1
    assert len(sequence) == 1 + a + 66 + 258 + b + 1
    assert sequence.input_ids == [
        1, *IDS[:a], 32003, *[32004] * 64, 32002, 32001, *[32004] * 256, 32005, *IDS[a:], 2,
    ]  # fmt: skip
    assert sequence.labels == [1, *IDS[:a], 32003, *[IGNORED] * (65 + 258), *IDS[a:], 2]
    assert (sequence.dream_starts, sequence.image_starts) == ([a + 2], [a + 68])
    assert sequence.images == sequence.targets == [png(0)]
