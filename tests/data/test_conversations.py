"""Conversations whose turns bring their own pictures (the new form of the specification, C.4)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamllm.data import BadSampleError, Conversations
from dreamllm.documents import PLAIN, Picture, conversation
from tests.data.pictures import write_jsonl


def turn(role: str, value: str, **modal_info) -> dict:
    return {"from": role, "value": value, **({"modal_info": modal_info["info"]} if modal_info else {})}


def reader_of(tmp_path: Path, *turns: dict, **more) -> Conversations:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"conversations": list(turns), **more}]))
    return Conversations(path, PLAIN, learn_dream=True)


def places(reader: Conversations) -> list[tuple[str, bool, bool]]:
    """(file, read, created) of each picture."""
    pictures = reader.document(0).pictures()
    return [(picture.source.name, picture.comprehension, picture.creation) for picture in pictures]


def test_each_turn_brings_its_pictures(tmp_path):
    pictures = {"<a>": ["image", ["1.png", "3.png"]], "<b>": ["image", ["2.png"]]}
    drawn = {"<dream>": ["image", ["4.png"]], "<new>": ["dream", ["5.png"]]}
    reader = reader_of(
        tmp_path,
        turn("human", "<a> and <b>, then <a>?", info=pictures),
        turn("gpt", "Here: <dream> and <new>", info=drawn),
        turn("human", "Thanks"),
        turn("gpt", "Welcome"),
    )
    turns = [
        ("user", "<image> and <image>, then <image>?"), ("assistant", "Here: <dream> and <dream>"),
        ("user", "Thanks"), ("assistant", "Welcome"),
    ]  # fmt: skip
    files = [tmp_path / f"{i}.png" for i in (1, 2, 3, 4, 5)]
    assert reader.document(0) == conversation(turns, files, PLAIN, learn_dream=True, name="chat sample 0")


def test_the_new_form_equals_the_old_one(tmp_path):
    question, answer = "<image>\nWhat is it, and draw it.", "A dog. <dream>"
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = reader_of(tmp_path / "old", turn("human", question), turn("gpt", answer), image=["a.png", "b.png"])
    new = reader_of(
        tmp_path / "new",
        turn("human", question, info={"<image>": ["image", ["a.png"]]}),
        turn("gpt", answer, info={"<dream>": ["image", ["b.png"]]}),
    )

    def plain(reader):
        parts = reader.document(0).parts
        return [(p.source.name, p.creation, p.learn) if isinstance(p, Picture) else p for p in parts]

    assert plain(new) == plain(old)


def test_a_placeholder_that_begins_another_is_not_taken_for_it(tmp_path):
    info = {"<img": ["image", ["short.png"]], "<img_2>": ["image", ["long.png"]]}
    reader = reader_of(tmp_path, turn("human", "<img_2> <img", info=info), turn("gpt", "Yes"))
    assert [name for name, _, _ in places(reader)] == ["long.png", "short.png"]


def test_a_first_turn_that_is_dropped_takes_its_pictures_along(tmp_path):
    reader = reader_of(
        tmp_path,
        turn("gpt", "<image>", info={"<image>": ["image", ["gone.png"]]}),
        turn("human", "<image>", info={"<image>": ["image", ["kept.png"]]}),
        turn("gpt", "Yes"),
    )
    assert [name for name, _, _ in places(reader)] == ["kept.png"]


@pytest.mark.parametrize(
    ("text", "info", "reason", "message"),
    [
        ("<a> <a>", {"<a>": ["image", ["1.png"]]}, "picture_slots", "more <a> than pictures"),
        ("none", {"<a>": ["image", ["1.png"]]}, "picture_slots", "1 pictures in .modal_info. without a place"),
        ("<a>", {"<a>": ["video", ["1.mp4"]]}, "malformed", "modal type 'video' is not supported"),
        ("<a>", {"<a>": ["image"]}, "malformed", r"must be \[type, \[paths\]\]"),
        ("<a>", ["<a>"], "malformed", "must be {placeholder"),
        ("<a>", {"<a>": ["image", [7]]}, "malformed", "must be a path"),
        (
            "<image> <a>",
            {"<a>": ["image", ["1.png"]]},
            "picture_slots",
            "2 <image>/<dream> placeholders but 1",
        ),
    ],
)
def test_pictures_and_places_must_fit(tmp_path, text, info, reason, message):
    reader = reader_of(tmp_path, turn("human", text, info=info), turn("gpt", "Yes"))
    with pytest.raises(BadSampleError, match=message) as error:
        reader.document(0)
    assert error.value.reason == reason


def test_both_forms_at_once_are_refused(tmp_path):
    mixed = turn("human", "<image>", info={"<image>": ["image", ["1.png"]]})
    with pytest.raises(BadSampleError, match='has both "image" and "modal_info"'):
        reader_of(tmp_path, mixed, turn("gpt", "Yes"), image="1.png").document(0)


def test_conversations_may_be_json_lines(tmp_path):
    talk = {"conversations": [turn("human", "Hi"), turn("gpt", "Hello")]}
    reader = Conversations(write_jsonl(tmp_path / "chat.jsonl", [talk, talk]), PLAIN)
    assert len(reader) == 2
    assert reader.document(1).name == "chat line 2"


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "chat.json").write_text(
        '[{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}]'
    )
    with pytest.raises(BadSampleError, match="is not valid Unicode"):
        Conversations(tmp_path / "chat.json", PLAIN).document(0)
