"""Interleaved documents in tars and instructions answered by them: layouts of the specification, and what is amiss."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamllm.data import BadSampleError, FilteredSampleError, Filters, Instructions, Interleaved, TarInterleaved
from dreamllm.documents import PLAIN, VICUNA_V1_1, Document, Text, encode_document, interleaved
from tests.data.pictures import png, write_jsonl, write_tar

STORY = ["First.", "Second.", "Third."]


def info(name: str, index: int, **more) -> dict:
    return {"image_name": name, "matched_text_index": index, **more}


def story(*infos: dict, **more) -> bytes:
    return json.dumps({"text_list": STORY, "image_info": list(infos), **more}).encode()


def open_tar(path: Path, members: dict[str, bytes], **options) -> TarInterleaved:
    return TarInterleaved([write_tar(path / "0.tar", members)], **options)


def shape(document: Document) -> list:
    return [part.text if isinstance(part, Text) else type(part).__name__ for part in document.parts]


def sources(document: Document) -> list:
    return [picture.source for picture in document.pictures()]


def reason_of(reader, index: int = 0) -> str:
    with pytest.raises(BadSampleError) as error:
        reader.document(index)
    return error.value.reason


def test_a_json_and_the_pictures_after_it_are_a_document(tmp_path):
    reader = open_tar(
        tmp_path,
        {
            "a-1.json": story(info("dog.png", 1), info("cat.jpeg", 0)), "a-1-dog.jpg": png(0), "a-1-cat.jpg": png(1),
            "b.json": story(), "folder/c.json": story(info("x.jpg", 2)), "folder/c-x.jpg": png(2),
        },
    )  # fmt: skip
    assert len(reader) == 3
    assert shape(reader.document(0)) == ["First.", "Picture", "Second.", "Picture", "Third.", "End"]
    assert sources(reader.document(0)) == [png(1), png(0)]
    assert reader.document(0).name == "0.tar:a-1"
    assert shape(reader.document(1)) == ["First. Second. Third.", "End"]
    assert shape(reader.document(2)) == ["First. Second. Third.", "Picture", "End"]
    assert all(not reader.document(i).remarks for i in range(3))


@pytest.mark.parametrize(
    ("member", "image_name"),
    [
        ("7-dog.jpg", "dog.jpg"),
        ("7-dog.jpg", "dog.png"),
        ("7-DOG.JPG", "Dog.png"),
        ("7-dog.small.jpg", "dog.small.png"),
        ("7-dog.jpg", "dog.small.png"),
        ("7-0a-1b-dog.jpg", "dog.png"),
        ("dog.jpg", "dog.png"),
        ("7-dog.webp", "folder/dog.jpg"),
        ("sub/7-dog.jpg", "dog.jpg"),
        ("7-dog.jpg", "7-dog.jpg"),
    ],
)
def test_pictures_are_found_under_old_and_new_names(tmp_path, member, image_name):
    reader = open_tar(tmp_path, {"7.json": story(info(image_name, 0)), member: png(3)})
    assert sources(reader.document(0)) == [png(3)]


def test_a_short_name_that_fits_several_members_fits_none(tmp_path):
    members = {"7-x.one.jpg": png(1), "7-x.two.jpg": png(2)}
    reader = open_tar(tmp_path, {"7.json": story(info("x.two.png", 0), info("x.png", 1)), **members})
    assert sources(reader.document(0)) == [png(2)]
    assert reader.document(0).remarks == (("lost_picture", "0.tar:7, picture x.png does not exist"),)


def test_a_missing_picture_costs_the_picture_only(tmp_path):
    reader = open_tar(tmp_path, {"7.json": story(info("gone.jpg", 0), info("here.jpg", 2)), "7-here.jpg": png(0)})
    assert shape(reader.document(0)) == ["First. Second. Third.", "Picture", "End"]
    assert [reason for reason, _ in reader.document(0).remarks] == ["lost_picture"]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"[]", "malformed"),
        (b"\xff{}", "malformed"),
        (b"{}", "malformed"),
        (b"[" * 5000, "malformed"),
        (b'{"text_list": ["a", 1]}', "malformed"),
        (b'{"text_list": ["\\ud800"]}', "malformed"),
        (b'{"text_list": ["a"], "image_info": [{"image_name": "x.jpg"}]}', "malformed"),
        (b'{"text_list": ["a"], "image_info": [{"image_name": "x.jpg", "matched_text_index": 1}]}', "malformed"),
        (b'{"text_list": ["a"], "image_info": [{"image_name": "x.jpg", "matched_text_index": null}]}', "malformed"),
        (b'{"text_list": [" "], "image_info": []}', "empty_caption"),
        (b'{"text_list": []}', "empty_caption"),
    ],
)
def test_unusable_documents_are_named_with_the_reason(tmp_path, head, reason):
    reader = open_tar(tmp_path, {"7.json": head, "8.json": story()})
    assert reason_of(reader) == reason
    assert reader.document(1).name == "0.tar:8"


def test_pictures_before_the_first_json_are_one_unusable_sample(tmp_path):
    reader = open_tar(tmp_path, {"6-a.jpg": png(0), "6-b.jpg": png(1), "7.json": story()})
    assert len(reader) == 2
    assert reason_of(reader) == "malformed"


def test_pictures_after_damage_join_no_document(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"1.json": story(), "2.json": story(info("a.jpg", 0)), "2-a.jpg": png(0)})
    data = bytearray(path.read_bytes())
    data[1024 + 5] ^= 1  # in the header of 2.json
    path.write_bytes(data)
    reader = TarInterleaved([path])
    assert [reason_of(reader, i) for i in range(1, len(reader))] == ["truncated_archive"]
    assert reader.document(0).name == "0.tar:1"


def test_the_similarity_filter_takes_pictures_out(tmp_path):
    infos = [info("a.jpg", 0, matched_sim=0.25), info("b.jpg", 1, matched_sim=0.2499), info("c.jpg", 2)]
    members = {"7.json": story(*infos), **{f"7-{name}.jpg": png(i) for i, name in enumerate("abc")}}
    reader = open_tar(tmp_path, members, filters=Filters(min_similarity=0.25))
    document = reader.document(0)
    assert sources(document) == [png(0)]
    assert [reason for reason, _ in document.remarks] == ["filtered_picture"] * 2
    assert "matched_sim 0.250, below 0.25" in document.remarks[0][1]
    assert "has no matched_sim" in document.remarks[1][1]
    strict = TarInterleaved(reader.tars, filters=Filters(min_similarity=0.25, min_pictures=2))
    with pytest.raises(FilteredSampleError, match="1 pictures left, fewer than 2") as error:
        strict.document(0)
    assert error.value.reason == "few_pictures"
    assert strict.describe()["filters"] == {"min_similarity": 0.25, "min_pictures": 2}


def test_small_and_blacklisted_pictures_lose_their_place(tmp_path):
    infos = [info("a.jpg", 0), info("b.jpg", 1), info("c.jpg", 2, raw_url="http://bad/c")]
    members = {"7.json": story(*infos), "7-a.jpg": png(0, 32), "7-b.jpg": png(1, 16), "7-c.jpg": png(2, 32)}
    (tmp_path / "list").write_text("http://bad/c\n")
    reader = open_tar(tmp_path, members, filters=Filters(min_size=16, blacklist=tmp_path / "list"))
    assert sources(reader.document(0)) == [png(0, 32)]
    messages = [message for _, message in reader.document(0).remarks]
    assert "16 x 16 pixels, both must exceed 16" in messages[0]
    assert "http://bad/c is blacklisted" in messages[1]


WORDS = st.text(string.ascii_letters, min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), texts=st.lists(WORDS, min_size=1, max_size=5))
def test_a_tar_and_json_lines_give_what_the_format_says(tmp_path_factory, data, texts):
    """Both readers against the documents module, which the golden data test."""
    folder = tmp_path_factory.mktemp("random")
    stems = data.draw(st.lists(WORDS.map(str.lower), max_size=4, unique=True))
    indices = [data.draw(st.integers(0, len(texts) - 1)) for _ in stems]
    pictures = {stem: png(i, 4) for i, stem in enumerate(stems)}
    values = {"text_list": texts, "image_info": [info(f"{s}.png", i) for s, i in zip(stems, indices, strict=True)]}
    expected = interleaved(texts, [(i, pictures[s]) for s, i in zip(stems, indices, strict=True)], "joint")
    members = {"d.json": json.dumps(values).encode(), **{f"d-{s}.jpg": p for s, p in pictures.items()}}
    assert open_tar(folder, members).document(0).parts == expected.parts
    for stem, picture in pictures.items():
        (folder / f"{stem}.png").write_bytes(picture)
    lines = Interleaved(write_jsonl(folder / "d.jsonl", [values])).document(0)
    assert shape(lines) == shape(expected)
    assert [Path(source).read_bytes() for source in sources(lines)] == sources(expected)


def test_several_json_lines_files_share_a_picture_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    for name in ("docs_0", "docs_1"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text_list": [name], "image_info": [info("a.png", 0)]}] * 2)
    reader = Interleaved([tmp_path / "docs_0.jsonl", tmp_path / "docs_1.jsonl"])
    assert [reader.document(i).name for i in range(4)] == [f"docs_{i} line {j}" for i in (0, 1) for j in (1, 2)]
    assert reader.document(3).text() == "docs_1"
    assert len(reader.document(3).pictures()) == 1


def task(**more) -> dict:
    return {"text_list": ["Mix it.", "Bake it."], "instruction": " How do I bake? ", "image_info": [], **more}


def test_an_instruction_is_a_prompt_and_its_document_the_answer(tmp_path, layout):
    """Section B.4: system, USER, instruction, an open ASSISTANT turn that is not learned, then as interleaved."""
    (tmp_path / "a.png").write_bytes(png(0))
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([task(image_info=[info("a.png", 0)])]))
    document = Instructions(path, VICUNA_V1_1).document(0)
    system = "A chat between a curious user and an artificial intelligence assistant. "
    prompt = "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    assert shape(document) == [
        f"{system}{prompt}USER: How do I bake? ASSISTANT:",
        "Mix it.",
        "Picture",
        "Bake it.",
        "End",
    ]
    encoded = encode_document(document, layout, lambda text: [100 + i for i in range(len(re.findall(r"\S+", text)))])
    words = len(document.parts[0].text.split())
    assert encoded.labels[1 : words + 1] == [-100] * words
    assert encoded.labels[words + 1 : words + 3] == [100, 101]
    assert encoded.labels[words + 3] == layout.dream_start
    assert encoded.labels[-3:] == [100, 101, layout.eos]


@pytest.mark.parametrize(
    "change", [{"instruction": 7}, {"instruction": " "}, {"instruction": None}, {"text_list": None}]
)
def test_instructions_without_instruction_or_answer_are_left_out(tmp_path, change):
    path = write_jsonl(tmp_path / "tasks.jsonl", [task(**change), task()])
    reader = Instructions(path, PLAIN)
    assert reason_of(reader) == "malformed"
    assert "How do I bake?" in reader.document(1).text()


@pytest.fixture
def layout():
    from dreamllm.documents import SequenceLayout

    return SequenceLayout(
        bos=1, eos=2, pad=32000, im_start=32001, im_patch=32004, im_end=32005, dream_start=32003, dream_end=32002,
        tokens_per_image=256, num_dream_queries=64, max_length=2048, vocab_size=32008,
    )  # fmt: skip
