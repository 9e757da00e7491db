"""What filters let through, and that they cost nothing they need not."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamllm.data import (
    BadSampleError,
    FilteredPairs,
    FilteredSampleError,
    Filters,
    FolderPairs,
    TarPairs,
    make_reader,
)
from dreamllm.data.filters import Screen, ascii_share
from tests.data.pictures import png, write_pairs, write_tar


def outcome(check) -> str | None:
    try:
        check()
    except FilteredSampleError as error:
        return error.reason
    return None


def of_text(text: str, **filters) -> str | None:
    screen = Screen(Filters(**filters))
    return outcome(lambda: screen.check_text(text, "x"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("see https://a.b/c", False),
        ("SEE HTTP://A.B", False),
        ("at www.shop.com now", False),
        ("awww. so sweet", True),
        ("the web", True),
    ],
)
def test_captions_with_web_addresses(text, kept):
    assert of_text(text, drop_url_captions=True) == (None if kept else "url_caption")
    assert of_text(text) is None


def test_words_and_phrases(tmp_path):
    (tmp_path / "words").write_text("# not this\nSpam\nbuy now\n\nstraße\n")
    for text, kept in [
        ("a can of SPAM!", False), ("spammer", True), ("so buy, NOW", False), ("buy it now", True),
        ("# not this", True), ("die STRASSE", False), ("", True),
    ]:  # fmt: skip
        assert of_text(text, blacklisted_words=tmp_path / "words") == (None if kept else "blacklisted"), text


@pytest.mark.parametrize(
    ("text", "share"), [("dog", 1.0), ("Hund süß", 5 / 7), ("狗", 0.0), ("12 + 3!", 0.0), ("", 0.0), ("a 1 ß", 0.5)]
)
def test_the_share_of_ascii_letters(text, share):
    assert ascii_share(text) == pytest.approx(share)
    assert of_text(text, min_ascii_share=0.5) == (None if share >= 0.5 else "other_language")


@given(st.text())
def test_a_share_is_a_share(text):
    assert 0 <= ascii_share(text) <= 1


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ({"LANGUAGE": "en"}, True),
        ({"lang": "EN"}, True),
        ({"language": "de"}, False),
        ({"LANGUAGE": None}, True),
        ({}, True),
        ({"lang": 7}, False),
    ],
)
def test_languages_by_their_field(metadata, kept):
    screen = Screen(Filters(languages=("en", "fr")))
    assert outcome(lambda: screen.check_metadata(metadata, "x")) == (None if kept else "other_language")


def tar_of(tmp_path, count: int = 4):
    members = {}
    for i in range(count):
        values = {"url": f"http://host/{i}", "LANGUAGE": "en" if i % 2 else "de"}
        members |= {f"k{i}.png": png(i), f"k{i}.txt": b"text", f"k{i}.json": json.dumps(values).encode()}
    return write_tar(tmp_path / "a.tar", members)


def kept_of(reader) -> list[int]:
    return [i for i in range(len(reader)) if outcome(lambda i=i: reader.document(i)) is None]


def test_a_blacklist_knows_keys_urls_and_hashes(tmp_path):
    tar = tar_of(tmp_path, 6)
    hashes = [hashlib.md5(png(2)).hexdigest(), hashlib.sha256(png(3)).hexdigest().upper()]
    (tmp_path / "list").write_text("\n".join(["k0", "http://host/1", *hashes, "a.tar:k4", "# k5"]))
    assert kept_of(make_reader("pair_tars", tar, filters={"blacklist": str(tmp_path / "list")})) == [5]


def test_metadata_is_read_when_a_filter_needs_it(tmp_path):
    tar = tar_of(tmp_path)
    reader = make_reader("pair_tars", tar, filters={"languages": ["en"]})
    assert kept_of(reader) == [1, 3]
    assert reader.source.source.metadata
    assert not make_reader("pair_tars", tar, filters={"min_size": 4}).source.source.metadata
    assert TarPairs([tar]).pair(0).metadata == {}


def test_metadata_of_a_listing(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [{"file_name": f"{i}.png", "text": "x", "lang": language} for i, language in enumerate(("en", "zh"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert kept_of(make_reader("pair_folder", tmp_path, filters={"languages": ["en"]})) == [0]


def test_the_size_must_be_exceeded_and_is_not_decoded(tmp_path, monkeypatch):
    write_pairs(tmp_path, 1)
    (tmp_path / "wide.png").write_bytes(png(1, 17))
    (tmp_path / "wide.txt").write_text("x")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    source = FilteredPairs(FolderPairs(tmp_path), Filters(min_size=16))
    assert outcome(lambda: source.pair(0)) == "small_picture"
    assert source.pair(1).name.endswith("wide.png")
    assert [pair.name for pair in source.usable()] == [source.pair(1).name]


def test_what_cannot_be_read_is_not_the_filters_business(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "1.txt").write_text("")
    source = FilteredPairs(FolderPairs(tmp_path), Filters(min_size=4))
    assert source.pair(0).name.endswith("0.png")
    with pytest.raises(BadSampleError) as error:
        source.pair(1)
    assert not isinstance(error.value, FilteredSampleError)


def test_conversations_are_filtered_whole(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 16))
    talk = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "See www.x.y"}]
    plain = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "chat.json").write_text(
        json.dumps([{"id": "one", "image": "a.png", "conversations": talk}, {"id": "two", "conversations": plain}])
    )
    (tmp_path / "list").write_text("two")
    for filters, kept in [
        ({"min_size": 16}, [1]), ({"drop_url_captions": True}, [1]), ({"blacklist": str(tmp_path / "list")}, [0]),
        ({"min_pictures": 1}, [0]), ({"min_size": 15}, [0, 1]),
    ]:  # fmt: skip
        assert kept_of(make_reader("conversations", tmp_path / "chat.json", filters=filters)) == kept


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ({"min_size": -1}, ValueError, "min_size must not be negative"),
        ({"min_pictures": -1}, ValueError, "min_pictures must not be negative"),
        ({"min_ascii_share": 1.5}, ValueError, "between 0 and 1"),
        ({"languages": "en"}, ValueError, r"must be a list such as \[en\]"),
        ({"blacklist": "nowhere"}, FileNotFoundError, "blacklist nowhere does not exist"),
    ],
)
def test_wrong_settings_are_errors(filters, error, message):
    with pytest.raises(error, match=message):
        Screen(Filters(**filters))


def test_an_empty_or_unreadable_blacklist_is_an_error(tmp_path):
    (tmp_path / "list").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no entries"):
        Screen(Filters(blacklist=tmp_path / "list"))
    (tmp_path / "list").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        Screen(Filters(blacklisted_words=tmp_path / "list"))
