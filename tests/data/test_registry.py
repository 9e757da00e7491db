"""Readers by the name of their kind, and kinds by what a path holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamllm.data import (
    KINDS,
    Conversations,
    Filters,
    FolderPairs,
    Instructions,
    Interleaved,
    TarInterleaved,
    TarPairs,
    UnknownDataError,
    make_part,
    make_reader,
    open_data,
)
from dreamllm.documents import PLAIN
from tests.data.pictures import png, write_jsonl, write_pairs, write_tar

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
STORY = {"text_list": ["One."], "image_info": []}


def write(kind: str, folder: Path) -> Path:
    """Some data of a kind."""
    folder.mkdir()
    if kind == "pair_tars":
        write_tar(folder / "0.tar", {"0.png": png(0), "0.txt": b"zero"})
    elif kind == "pair_folder":
        write_pairs(folder, 2)
    elif kind == "interleaved_tars":
        write_tar(folder / "0.tar", {"a.json": json.dumps(STORY).encode()})
    elif kind == "interleaved_lines":
        write_jsonl(folder / "docs.jsonl", [STORY])
    elif kind == "instructions":
        (folder / "tasks.json").write_text(json.dumps([{**STORY, "instruction": "Tell."}]))
    elif kind == "conversations":
        (folder / "chat.json").write_text(json.dumps([{"conversations": TALK}]))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from tests.data.arrow_folders import write_arrow

        write_arrow(folder, pyarrow.table({"text": ["a"], "image": [{"bytes": png(0), "path": None}]}))
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_is_recognised_and_can_be_named(tmp_path, kind):
    path = write(kind, tmp_path / "data")
    named, found = make_reader(kind, path), open_data(path)
    assert type(named) is type(found)
    assert len(named) == len(found) == (2 if kind == "pair_folder" else 1)
    assert named.document(0) == found.document(0) == make_reader("auto", str(path)).document(0)
    assert named.describe() == found.describe()
    assert json.loads(json.dumps(named.describe())) == named.describe()


def test_options_come_as_they_stand_in_yaml(tmp_path):
    path = write("pair_tars", tmp_path / "data")
    (tmp_path / "words.txt").write_text("zero\n")
    reader = make_reader(
        "pair_tars",
        path,
        mode="creation",
        filters={"languages": ["en"], "blacklisted_words": str(tmp_path / "words.txt")},
    )
    assert reader.mode == "creation"
    assert reader.source.filters == Filters(languages=("en",), blacklisted_words=tmp_path / "words.txt")
    assert make_reader("pair_tars", path, filters=reader.source.filters).source.filters == reader.source.filters
    talk = write("conversations", tmp_path / "talk")
    assert make_reader("conversations", talk, template="plain").template == PLAIN


def test_a_part_has_a_virtual_size(tmp_path):
    path = write("pair_folder", tmp_path / "data")
    assert make_part("pair_folder", path, size="20M", mode="creation").size == "20M"
    assert make_part("pair_folder", path, weight=0.5).weight == 0.5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pair_tar", {}, "unknown kind of data 'pair_tar'. Did you mean 'pair_tars'"),
        ("pair_folder", {"fliters": {}}, "has no option 'fliters'. Did you mean 'filters'"),
        ("pair_folder", {"json_caption_key": "x"}, "kind pair_folder has no option 'json_caption_key'"),
        ("pair_folder", {"mode": "joint"}, "kind pair_folder.*mode"),
        ("pair_folder", {"filters": {"min_sise": 3}}, "min_sise"),
        ("pair_folder", {"filters": {"min_size": "big"}}, "min_size"),
        ("pair_folder", {"filters": {"min_size": -1}}, "must not be negative"),
        ("pair_folder", {"filters": {"min_ascii_share": 2}}, "between 0 and 1"),
        ("pair_folder", {"seed": "x"}, "seed"),
        ("auto", {"caption_column": "x"}, "kind pair_folder has no option 'caption_column'"),
    ],
)
def test_mistakes_in_options_are_errors(tmp_path, kind, options, message):
    path = write("pair_folder", tmp_path / "data")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_reader(kind, path, **options)


@pytest.mark.parametrize("url", ["s3://bucket/tars", "https://host/a.tar", "gs://x/y", "hdfs://host/x"])
def test_remote_stores_are_refused_with_what_to_do(tmp_path, url):
    for opened in (lambda: make_reader("pair_tars", url), lambda: open_data(url), lambda: open_data(Path(url))):
        with pytest.raises(ValueError, match=r"is on \w+, which is not read directly; copy the data to a disk"):
            opened()


def test_a_list_of_tars_is_a_path_too(tmp_path):
    for name in ("a", "b", "unused"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png(0), f"{name}.txt": name.encode()})
    (tmp_path / "shards.json").write_text(json.dumps(["b.tar", str(tmp_path / "a.tar")]))
    reader = open_data(tmp_path / "shards.json", mode="creation")
    assert [reader.document(i).text() for i in range(len(reader))] == ["b", "a"]
    (tmp_path / "shards.json").write_text('["s3://bucket/a.tar"]')
    with pytest.raises(ValueError, match="is on s3"):
        open_data(tmp_path / "shards.json")
    (tmp_path / "shards.json").write_text('["gone.tar"]')
    with pytest.raises(FileNotFoundError, match=r"gone\.tar does not exist"):
        open_data(tmp_path / "shards.json")


def test_the_order_in_which_kinds_are_looked_for(tmp_path):
    folder = write("pair_folder", tmp_path / "data")
    (folder / "docs.jsonl").write_text(json.dumps(STORY) + "\n")
    assert isinstance(open_data(folder), Interleaved)
    assert isinstance(open_data(folder / "docs.jsonl"), Interleaved)
    write_tar(folder / "0.tar", {"0.png": png(0), "0.txt": b"zero"})
    assert isinstance(open_data(folder).source, TarPairs)
    assert isinstance(make_reader("pair_folder", folder).source, FolderPairs)


def test_classes_of_the_kinds(tmp_path):
    kinds = {"interleaved_tars": TarInterleaved, "instructions": Instructions, "conversations": Conversations}
    for kind, expected in kinds.items():
        assert type(open_data(write(kind, tmp_path / kind), template=PLAIN)) is expected


def test_what_is_not_read_is_told_with_what_to_do(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnknownDataError, match=r"(?s)Looked for.*found 1 \.parquet; Parquet is not read.*save_to_disk"):
        open_data(tmp_path / "data")
    (tmp_path / "data" / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UnknownDataError, match=r"a\.tar\.gz is compressed: unpack it"):
        make_reader("pair_tars", tmp_path / "data")
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        make_reader("pair_folder", tmp_path / "data" / "a.tar.gz")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": TALK}]))
    with pytest.raises(UnknownDataError, match="several data files"):
        open_data(tmp_path)
