"""Every reader against files written here, read back with something else."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest
from PIL import Image

from dreamllm.data import (
    BadSampleError,
    CaptionInstructions,
    Conversations,
    FolderPairs,
    Interleaved,
    Pairs,
    TarPairs,
    UnknownDataError,
    open_data,
    open_pairs,
)
from dreamllm.documents import PLAIN, Text, load_picture
from tests.data.pictures import png, write_jsonl, write_pairs, write_tar
from tests.tiny import random_picture


def reason_of(read) -> str:
    with pytest.raises(BadSampleError) as error:
        read()
    return error.value.reason


def test_a_folder_gives_its_pairs_in_the_order_of_their_paths(tmp_path):
    for stem in ("b", "sub/deep/a", "a"):
        (tmp_path / stem).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{stem}.png").write_bytes(png(1))
        (tmp_path / f"{stem}.txt").write_text(f"  caption of {stem}\n")
    source = FolderPairs(tmp_path, "set")
    assert [source.pair(i).caption for i in range(len(source))] == [
        "caption of a", "caption of b", "caption of sub/deep/a",
    ]  # fmt: skip
    assert source.pair(2).name == "set/sub/deep/a.png"
    assert load_picture(source.pair(2).image).tobytes() == random_picture(1).tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".png"])
def test_a_folder_takes_every_picture_format(tmp_path, suffix):
    picture = random_picture(0)
    picture.save(tmp_path / f"x{suffix}", {"jpg": "JPEG", "jpeg": "JPEG"}.get(suffix[1:].lower(), suffix[1:].upper()))
    (tmp_path / "x.txt").write_text("x")
    assert load_picture(open_pairs(tmp_path).pair(0).image).size == picture.size


@pytest.mark.parametrize("file", ["captions.jsonl", "metadata.jsonl"])
def test_a_listing_names_pictures_and_captions(tmp_path, file):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p.png").write_bytes(png(3))
    write_jsonl(tmp_path / file, [{"file_name": "images/p.png", "text": "three"}, {"file_name": "no.png", "text": "x"}])
    with open(tmp_path / file, "a") as listing:
        listing.write('{"file_name": "images/p.png"}\nnot json\n')
    source = open_pairs(tmp_path)
    assert len(source) == 4
    assert source.pair(0).caption == "three"
    assert [reason_of(lambda i=i: source.pair(i)) for i in (1, 2, 3)] == ["missing_image", "malformed", "malformed"]


def test_incomplete_pairs_of_a_folder_are_named_with_the_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.txt").write_text("no picture")
    (tmp_path / "c.png").write_bytes(png(0))
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.png").write_bytes(png(0))
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    source = FolderPairs(tmp_path)
    reasons = [reason_of(lambda i=i: source.pair(i)) for i in range(4)]
    assert reasons == ["missing_caption", "missing_image", "empty_caption", "malformed"]
    assert list(source.usable()) == []


def tar_members() -> dict[str, bytes]:
    return {
        "000.jpg": png(0), "000.txt": b"zero", "000.json": b'{"caption": "json zero", "alt": "other zero"}',
        "dir/001.png": png(1), "dir/001.json": b'{"caption": "json one", "alt": "other one"}',
        "002.png": png(2), "003.txt": b"alone", "004.png": png(4), "004.txt": b"", "._005.png": b"", "notes.md": b"x",
        "006.png": png(6), "006.json": b"{",
    }  # fmt: skip


def test_tars_are_read_by_offset_as_tarfile_reads_them(tmp_path):
    first = write_tar(tmp_path / "a.tar", tar_members())
    second = write_tar(tmp_path / "b.tar", {"000.png": png(7), "000.txt": "größer".encode()})
    source = TarPairs([first, second])
    assert [reason_of(lambda i=i: source.pair(i)) for i in (2, 3, 4, 5)] == [
        "missing_caption", "missing_image", "empty_caption", "malformed",
    ]  # fmt: skip
    pairs = [source.pair(i) for i in (6, 1, 0)]
    assert [pair.caption for pair in pairs] == ["größer", "json one", "zero"]
    with tarfile.open(first) as tar:
        assert pairs[1].image == tar.extractfile("dir/001.png").read()
        assert pairs[2].image == tar.extractfile("000.jpg").read()
    assert pairs[1].name == "a.tar:dir/001"


def test_a_json_key_can_be_the_caption_of_a_tar(tmp_path):
    source = TarPairs([write_tar(tmp_path / "a.tar", tar_members())], json_caption_key="alt")
    assert [source.pair(i).caption for i in (0, 1)] == ["other zero", "other one"]


def test_a_tar_that_ends_early_keeps_what_came_before(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.{s}": d for i in range(3) for s, d in (("txt", b"x"), ("png", png(i)))})
    with tarfile.open(path) as tar:
        cut = tar.getmember("2.png").offset_data + 10
    path.write_bytes(path.read_bytes()[:cut])
    source = TarPairs([path])
    assert [source.pair(i).caption for i in (0, 1)] == ["x", "x"]
    assert reason_of(lambda: source.pair(2)) == "truncated_archive"


def test_what_is_not_a_tar_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is not an uncompressed tar"):
        open_pairs(tmp_path)


def test_readers_keep_no_open_file(tmp_path):
    source = TarPairs([write_tar(tmp_path / "a.tar", tar_members())])
    before = source.pair(0)
    assert pickle.loads(pickle.dumps(source)).pair(0) == before  # an open file could not be pickled


def test_a_pair_is_read_or_drawn(tmp_path):
    source = open_pairs(write_pairs(tmp_path, 1))
    reading, drawing = (Pairs(source, mode).document(0) for mode in ("comprehension", "creation"))
    assert reading.pictures()[0].comprehension
    assert not reading.pictures()[0].creation
    assert drawing.pictures()[0].creation
    assert not drawing.pictures()[0].comprehension


def test_both_directions_are_drawn_from_seed_epoch_and_index(tmp_path):
    source = open_pairs(write_pairs(tmp_path, 40))
    reader = Pairs(source, "both", seed=1)
    first = [reader.direction(i, 0) for i in range(40)]
    assert 8 < first.count("creation") < 32
    assert first == [Pairs(source, "both", seed=1).direction(i, 0) for i in range(40)]
    assert first != [reader.direction(i, 1) for i in range(40)]
    assert first != [Pairs(source, "both", seed=2).direction(i, 0) for i in range(40)]


def test_instructions_ask_about_a_picture_or_for_one(tmp_path):
    reader = CaptionInstructions(open_pairs(write_pairs(tmp_path, 20)), PLAIN, seed=3)
    texts = [reader.document(i).text() for i in range(20)]
    asked = [t for t in texts if "What is this?" in t]
    wanted = [t for t in texts if "Draw: picture number" in t]
    assert len(asked) + len(wanted) == 20
    assert asked
    assert wanted
    learned = [p.text for i in range(20) for p in reader.document(i).parts if isinstance(p, Text) and p.learn]
    assert len(learned) == len(asked)
    assert all(text.startswith("picture number") for text in learned)


def test_a_caption_with_placeholders_stays_text_in_an_instruction(tmp_path):
    reader = CaptionInstructions(open_pairs(write_pairs(tmp_path, 8, "an <image> of a <dream> {}")), PLAIN)
    assert all(len(reader.document(i).pictures()) == 1 for i in range(8))


def mmc4_line(*indices: int) -> dict:
    info = [{"image_name": f"{k}.png", "matched_text_index": i, "matched_sim": 0.3} for k, i in enumerate(indices)]
    return {"text_list": ["First.", " Second. ", "Third."], "image_info": info}


def test_interleaved_lines_become_documents(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    reader = Interleaved(write_jsonl(tmp_path / "docs.jsonl", [mmc4_line(1, 0), mmc4_line(), mmc4_line(9), [1], {}]))
    parts = reader.document(0).parts
    assert [type(part).__name__ for part in parts] == ["Text", "Picture", "Text", "Picture", "Text", "End"]
    assert [part.text for part in parts if isinstance(part, Text)] == ["First.", "Second.", "Third."]
    assert [part.source.name for part in reader.document(0).pictures()] == ["1.png", "0.png"]
    assert len(reader.document(1).pictures()) == 0
    assert [reason_of(lambda i=i: reader.document(i)) for i in (2, 3, 4)] == ["malformed"] * 3


def turns(question: str, answer: str, user: str = "human", assistant: str = "gpt") -> list[dict]:
    return [{"from": user, "value": question}, {"from": assistant, "value": answer}]


def test_conversations_follow_llava(tmp_path):
    samples = [
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "A")},
        {"conversations": [{"from": "gpt", "value": "dropped"}, *turns("Q", "A")]},
        {"image": "a.png", "conversations": turns("Draw.", "<dream>", "user", "assistant")},
        {"image": ["a.png", "b.png"], "conversations": turns("<image>", "A")},
        {"conversations": turns("<dream>", "A")},
        {"conversations": [{"from": "stranger", "value": "x"}]},
        {"image": "a.png"},
        7,
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(samples))
    reader = Conversations(path, PLAIN)
    assert reader.document(0).pictures()[0].source == tmp_path / "a.png"
    assert "dropped" not in reader.document(1).text()
    assert reader.document(2).pictures()[0].creation
    reasons = [reason_of(lambda i=i: reader.document(i)) for i in range(3, 8)]
    assert reasons == ["picture_slots", "picture_slots", "malformed", "malformed", "malformed"]


def test_open_data_recognises_what_a_folder_holds(tmp_path):
    write_pairs(tmp_path / "folder", 2)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", tar_members())
    (tmp_path / "mmc4").mkdir()
    write_jsonl(tmp_path / "mmc4" / "docs.jsonl", [mmc4_line()])
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "chat.json").write_text('[{"conversations": []}]')
    kinds = {name: open_data(tmp_path / name) for name in ("folder", "tars", "mmc4", "llava")}
    assert isinstance(kinds["folder"].source, FolderPairs)
    assert isinstance(kinds["tars"].source, TarPairs)
    assert isinstance(kinds["mmc4"], Interleaved)
    assert isinstance(kinds["llava"], Conversations)
    assert isinstance(open_data(tmp_path / "tars" / "0.tar").source, TarPairs)
    assert isinstance(open_data(tmp_path / "llava" / "chat.json"), Conversations)


def test_unknown_data_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "c.png").write_bytes(png(0))
    with pytest.raises(UnknownDataError, match=r"(?s)webdataset.*text_list.*conversations.*found 2 \.csv, 1 \.png"):
        open_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(UnknownDataError, match="one file of 1 bytes"):
        open_pairs(tmp_path / "a.csv")


def test_pictures_inside_tars_decode(tmp_path):
    image = open_pairs(write_tar(tmp_path / "a.tar", tar_members())).pair(0).image
    assert Image.open(io.BytesIO(image)).size == (16, 16)
