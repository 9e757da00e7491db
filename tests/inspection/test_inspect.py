"""`dreamllm data inspect`: figures that are right, and a page that shows what the model gets."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dreamllm.cli import main
from dreamllm.data import Interleaved, make_reader
from dreamllm.documents import IGNORE_INDEX, PLAIN, conversation, pair
from dreamllm.documents import Document as Doc
from dreamllm.inspection import page, survey
from dreamllm.inspection.segments import parts_of_document, parts_of_sequence
from tests.data.pictures import png, write_jsonl, write_pairs, write_tar
from tests.tiny import random_picture, tiny_model

HOSTILE = "<script>alert('x')</script> <img src=x onerror=y> & \"quoted\" \x07 \u202e"


class Page(HTMLParser):
    """The elements of a page and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag == "style"

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_model(folder / "parts")[1]
    processor.save_pretrained(folder / "model")
    return folder / "model", processor


def test_segments_of_a_sequence_are_its_tokens(model):
    """Every token is in one segment, and a run is learned exactly where its labels are."""
    processor = model[1]
    picture = random_picture(0)
    turns = [("user", "<image> What?"), ("assistant", "A dog. <dream>"), ("user", "Thanks"), ("assistant", "Bye")]
    documents = [
        pair(picture, "a caption", "comprehension"),
        pair(picture, "a caption", "creation"),
        conversation(turns, [picture, picture], PLAIN, learn_dream=True),
    ]
    for document in documents:
        encoded = processor.encode(document)
        segments = parts_of_sequence(encoded, processor.layout, processor.decode_text)
        assert sum(segment.tokens for segment in segments) == len(encoded)
        position = 0
        for segment in segments:
            labels = encoded.labels[position : position + segment.tokens]
            if segment.kind == "text":
                assert {label != IGNORE_INDEX for label in labels} == {segment.learned}
                assert processor.encode_text(segment.text) == encoded.input_ids[position : position + segment.tokens]
            position += segment.tokens
        whole = [segment.kind for segment in parts_of_document(document)]
        assert [s.kind for s in segments if s.kind not in ("begin", "text")] == [k for k in whole if k != "text"]


def test_kinds_and_colours_of_a_pair(model):
    processor = model[1]
    reading = parts_of_sequence(
        processor.encode(pair(random_picture(0), "dog", "comprehension")), processor.layout, processor.decode_text
    )
    assert [(s.kind, s.learned) for s in reading] == [
        ("begin", False), ("image", False), ("text", True), ("end", True),
    ]  # fmt: skip
    drawing = parts_of_sequence(
        processor.encode(pair(random_picture(0), "dog", "creation")), processor.layout, processor.decode_text
    )
    assert [(s.kind, s.learned) for s in drawing] == [
        ("begin", False), ("text", False), ("dream", False), ("end", False),
    ]  # fmt: skip


def stories(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(png(0, 300))
    info = [{"image_name": "a.png", "matched_text_index": 0}, {"image_name": "gone.png", "matched_text_index": 1}]
    lines = [{"text_list": [HOSTILE, f"Story {i}."], "image_info": info} for i in range(3)]
    write_jsonl(folder / "docs.jsonl", [*lines, {"text_list": 7}])
    return folder


def test_the_page_shows_text_as_text_and_pictures_small(tmp_path, model, capsys):
    out = tmp_path / "page.html"
    main(["data", "inspect", str(stories(tmp_path / "data")), "--model", str(model[0]), "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"lost picture +3 +used, but changed", printed)
    assert re.search(r"malformed +1 +cannot be used", printed)
    assert "\x07" not in printed
    found = Page(out.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in found.tags]
    assert "script" not in tags
    assert "<script>alert('x')</script>" in found.text
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) == 6  # each created and seen
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in pictures)
    assert {attributes["width"] for attributes in pictures} == {"168"}
    assert "DRM, 6 tokens" in found.text
    assert "IMG, 6 tokens" in found.text
    assert not re.search(r"(src|href)=\"(?!data:)", out.read_text(encoding="utf-8"))


def test_without_a_model_the_parts_are_shown(tmp_path):
    reader = make_reader("interleaved_lines", stories(tmp_path))
    found = survey(reader, "pair_folder", 10, 2)
    assert (found.documents, found.examined, len(found.characters), len(found.shown)) == (4, 4, 3, 2)
    assert (sum(found.pictures), found.created, found.tokens) == (3, 3, [])
    assert found.log.counts == {"lost_picture": 3, "malformed": 1}
    text = Page(page(found, "t")).text
    assert "All 4 documents were looked at." in text
    assert "Without a model, tokens are not counted" in text


def test_figures_with_a_model_are_those_of_the_sequences(tmp_path, model):
    processor = model[1]
    reader = Interleaved(stories(tmp_path) / "docs.jsonl")
    found = survey(reader, "pair_folder", 10, 1, processor, processor.decode_text)
    lengths = []
    for i in range(3):
        document = reader.document(i)
        lengths.append(len(processor.encode(Doc(document.parts, "stop", "x"))))
    assert sorted(found.tokens) == sorted(lengths)
    assert found.created == 3


def test_a_sample_of_the_documents_is_drawn_the_same_each_time(tmp_path):
    reader = make_reader("pair_folder", write_pairs(tmp_path, 40), mode="creation")
    first, again = survey(reader, "pair_tars", 10, 5), survey(reader, "pair_tars", 10, 5)
    assert [shown.name for shown in first.shown] == [shown.name for shown in again.shown]
    assert (first.examined, len(first.characters)) == (10, 10)
    assert "10 of 40 documents were looked at, drawn at random." in Page(page(first, "t")).text


def test_filtered_and_broken_samples_are_told_apart(tmp_path, capsys):
    members = {}
    for i in range(6):
        members |= {f"{i}.png": png(i, 8 if i < 2 else 32) if i != 5 else b"broken", f"{i}.txt": b"text"}
    write_tar(tmp_path / "a.tar", members)
    options = json.dumps({"filters": {"min_size": 16}, "mode": "creation"})
    out = tmp_path / "p.html"
    main(["data", "inspect", str(tmp_path / "a.tar"), "--kind", "pair_tars", "--options", options, "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"small picture +2 +left out by a filter", printed)
    assert re.search(r"corrupt image +1 +cannot be used", printed)
    assert "3 usable, 1 unusable, 2" in printed
    assert re.search(r"kind +pair_tars", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examine", "0"], "examine must be at least 1"),
        (["--samples", "-1"], "samples must be at least 0"),
        (["--kind", "tars"], "unknown kind of data 'tars'"),
        (["--options", "{mod: x}"], "has no option 'mod'. Did you mean 'mode'"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["data", "inspect", str(write_pairs(tmp_path, 1)), "--out", str(tmp_path / "x.html"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
