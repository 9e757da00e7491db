"""JSON records by their places: the same as Python's parser finds, without keeping them."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamllm.data import BadSampleError
from dreamllm.data import records as module
from dreamllm.data.records import JsonRecords

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('"\\[]{},: \nabß\U0001f600'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\]},x', max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    separators=st.sampled_from([(",", ":"), (" ,\n", " : ")]),
    ascii_only=st.booleans(),
    chunk=st.sampled_from([5, 64, 1 << 24]),
)
def test_elements_of_a_list_are_what_a_parser_finds(tmp_path_factory, values, separators, ascii_only, chunk):
    path = tmp_path_factory.getbasetemp() / "records.json"
    path.write_text(f" {json.dumps(values, ensure_ascii=ascii_only, separators=separators)}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        records = JsonRecords([path])
    assert [records.record(i)[0] for i in range(len(records))] == values


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n \n"])
def test_lines_are_records(tmp_path, end, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n[2]\nnot json\n{"y": "\xc3\xbc"}' + end.encode())
    records = JsonRecords([tmp_path / "a.jsonl"])
    assert len(records) == 4
    assert [records.record(i) for i in (0, 1, 3)] == [
        ({"x": 1}, "a line 1"),
        ([2], "a line 2"),
        ({"y": "ü"}, "a line 4"),
    ]
    with pytest.raises(BadSampleError, match="a line 3 is not JSON") as error:
        records.record(2)
    assert error.value.reason == "malformed"


def test_several_files_follow_each_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name}{i}" for i in range(3)]))
    (tmp_path / "none.json").write_text("[]")
    records = JsonRecords([tmp_path / "a.json", tmp_path / "none.json", tmp_path / "b.json"])
    assert [records.record(i) for i in (2, 3, 5)] == [("a2", "a sample 2"), ("b0", "b sample 0"), ("b2", "b sample 2")]
    with pytest.raises(IndexError):
        records.record(6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("{}", "must hold a JSON list, not an object.*named .jsonl"),
        ("hello", "not something that begins b'hello'"),
        ('[{"a": 1}, {"b"', "ends inside its list; it may be cut short"),
        ('["open]', "ends inside its list"),
        ("[1]]", "brackets do not match"),
        ("[1][2]", "brackets do not match"),
        ("[1] x", "brackets do not match"),
    ],
)
def test_what_is_no_list_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)a\.json.*{message}"):
        JsonRecords([tmp_path / "a.json"])


@pytest.mark.parametrize("record", [b'{"x": \xff}', b"[" * 100_000 + b"]" * 100_000, b'{"x" 1}', b'"\xed\xa0\x80"'])
def test_hostile_records_cost_only_themselves(tmp_path, record):
    (tmp_path / "a.json").write_bytes(b"[1, " + record + b", 3]")
    records = JsonRecords([tmp_path / "a.json"])
    assert [records.record(i)[0] for i in (0, 2)] == [1, 3]
    with pytest.raises(BadSampleError, match="a sample 1 is not JSON"):
        records.record(1)


def test_a_file_that_changes_or_vanishes_after_opening_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1\n2\n")
    records = JsonRecords([path])
    os.utime(path, ns=(0, 0))
    with pytest.raises(BadSampleError, match="was changed after it was opened") as changed:
        records.record(0)
    path.unlink()
    with pytest.raises(BadSampleError, match="has disappeared") as gone:
        records.record(0)
    assert changed.value.reason == gone.value.reason == "changed_file"


def test_much_json_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("1\n" * 50)
    monkeypatch.setattr(module, "LOUD_BYTES", 99)
    with pytest.warns(
        UserWarning, match=r"of JSON in 1 files .*a\.jsonl.* are read through at every start; .*data build"
    ):
        JsonRecords([tmp_path / "a.jsonl"])
