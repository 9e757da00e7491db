"""Data converted into tars: what goes in comes out, also after an interruption; pictures made smaller on request."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dreamllm.cli import main
from dreamllm.data import build as module
from dreamllm.data import make_reader, open_data
from dreamllm.data.build import BuildError, BuildSettings, build
from dreamllm.documents import load_picture
from tests.data.pictures import png, write_jsonl, write_pairs
from tests.tiny import random_picture


def names_of(tar: Path) -> list[str]:
    with tarfile.open(tar) as archive:
        return archive.getnames()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pairs_come_back_from_their_tars(tmp_path, capsys):
    data = write_pairs(tmp_path / "data", 7)
    (data / "3.txt").write_text("")
    (data / "5.png").write_bytes(b"broken")
    main(["data", "build", "pair_tars", str(data), str(tmp_path / "tars"), "--settings.samples-per-shard", "3"])
    out = capsys.readouterr().out
    assert "5 of 7 samples in 3 tars, verified" in out
    assert "empty_caption: 1" in out
    assert "corrupt_image: 1" in out
    assert names_of(tmp_path / "tars" / "00001.tar") == [
        f"00000000{i}.{s}" for i in (4,) for s in ("png", "txt", "json")
    ]
    built, source = open_data(tmp_path / "tars", mode="creation"), open_data(data)
    kept = [0, 1, 2, 4, 6]
    assert [built.source.pair(i).caption for i in range(5)] == [f"picture number {i}" for i in kept]
    assert [built.source.pair(i).image for i in range(5)] == [source.source.pair(i).image.read_bytes() for i in kept]


def mmc4(folder: Path) -> Path:
    """Two files of JSON lines and a folder of pictures, one of which is missing and one broken."""
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        (folder / "images" / f"Dog.{i}.PNG").write_bytes(png(i) if i != 2 else b"broken")
    for number in range(2):
        lines = []
        for line in range(3):
            info = [
                {
                    "image_name": f"Dog.{k}.PNG",
                    "matched_text_index": k % 2,
                    "matched_sim": k / 9,
                    "raw_url": f"u{k}",
                }
                for k in (0, 1, 2, 3, 9)
            ]
            lines.append({"text_list": [f"file {number}", f"line {line}"], "image_info": info, "url": "http://x"})
        write_jsonl(folder / f"docs_{number}.jsonl", lines)
    return folder


def test_mmc4_as_distributed_becomes_tars_of_the_layout(tmp_path, capsys):
    data = mmc4(tmp_path / "mmc4")
    options = "{filters: {min_similarity: 0.1}}"
    command = ["data", "build", "interleaved_tars", str(data), str(tmp_path / "tars"), "--options", options]
    main([*command, "--settings.samples-per-shard", "4"])
    out = capsys.readouterr().out
    assert "6 of 6 samples in 2 tars, verified" in out
    assert "lost_picture: 12" in out
    assert "filtered_picture: 6" in out
    assert names_of(tmp_path / "tars" / "00000.tar")[:3] == ["000000000.json", "000000000-00.jpg", "000000000-01.jpg"]
    with tarfile.open(tmp_path / "tars" / "00001.tar") as tar:
        values = json.load(tar.extractfile("000000005.json"))
    assert [entry["image_name"] for entry in values["image_info"]] == ["00.jpg", "01.jpg"]
    assert [entry["source_image_name"] for entry in values["image_info"]] == ["Dog.1.PNG", "Dog.3.PNG"]
    assert values["image_info"][0]["raw_url"] == "u1"
    assert (values["url"], values["source"]) == ("http://x", "docs_1 line 3")
    built, source = open_data(tmp_path / "tars"), make_reader("auto", data, filters={"min_similarity": 0.1})
    for i in range(6):
        made, given = built.document(i), source.document(i)
        assert made.text() == given.text()
        assert [picture.source for picture in made.pictures()] == [png(1), png(3)]
        assert made.remarks == ()


def test_pictures_are_made_smaller_only_where_they_are_too_large(tmp_path):
    write_pairs(tmp_path / "data", 1)
    random_picture(1, 64).resize((64, 32)).save(tmp_path / "data" / "1.png")
    random_picture(2, 8).save(tmp_path / "data" / "2.gif")
    (tmp_path / "data" / "1.txt").write_text("large")
    settings = BuildSettings(max_side=32, quality=80)
    build(make_reader("pair_folder", tmp_path / "data"), tmp_path / "tars", settings)
    small, large = (open_data(tmp_path / "tars").source.pair(i).image for i in (0, 1))
    assert small == png(0)
    assert Image.open(io.BytesIO(large)).format == "JPEG"
    assert load_picture(large).size == (32, 16)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_build_goes_on_and_ends_the_same(tmp_path, monkeypatch, processes):
    reader = make_reader("pair_folder", write_pairs(tmp_path / "data", 9), mode="creation")
    settings = BuildSettings(samples_per_shard=2)
    build(reader, tmp_path / "whole", settings)
    write_shard = module._write_shard

    def fails_at_2(job, shard):
        if shard == 2:
            raise OSError(28, "No space left on device")
        write_shard(job, shard)

    monkeypatch.setattr(module, "_write_shard", fails_at_2)
    with pytest.raises(OSError, match="No space left"):
        build(reader, tmp_path / "tars", settings)
    assert sorted(p.name for p in (tmp_path / "tars").glob("*.tar")) == ["00000.tar", "00001.tar"]
    before = (tmp_path / "tars" / "00000.tar").stat().st_mtime_ns
    monkeypatch.setattr(module, "_write_shard", write_shard)
    (tmp_path / "tars" / "00001.build.json").unlink()  # killed between the tar and its record
    log = build(reader, tmp_path / "tars", settings, processes)
    assert log.documents == 9
    assert contents(tmp_path / "tars") == contents(tmp_path / "whole")
    assert (tmp_path / "tars" / "00000.tar").stat().st_mtime_ns == before


def test_a_full_disk_leaves_no_half_written_shard(tmp_path, monkeypatch):
    reader = make_reader("pair_folder", write_pairs(tmp_path / "data", 2), mode="creation")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space left"):
        build(reader, tmp_path / "tars", BuildSettings())
    assert sorted(p.name for p in (tmp_path / "tars").iterdir()) == ["build.json"]


def test_a_shard_that_changed_is_found_at_the_end(tmp_path):
    reader = make_reader("pair_folder", write_pairs(tmp_path / "data", 4), mode="creation")
    build(reader, tmp_path / "tars", BuildSettings(2))
    path = tmp_path / "tars" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(BuildError, match=r"00001\.tar is not what was written; remove 00001\.tar and 00001\.build"):
        build(reader, tmp_path / "tars", BuildSettings(2))


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    data = write_pairs(tmp_path / "data", 2)
    reader = make_reader("pair_folder", data, mode="creation")
    build(reader, tmp_path / "tars", BuildSettings())
    with pytest.raises(BuildError, match="holds another build"):
        build(reader, tmp_path / "tars", BuildSettings(max_side=8))
    with pytest.raises(BuildError, match="is not an empty folder"):
        build(reader, data, BuildSettings())
    with pytest.raises(SystemExit):
        main(["data", "build", "interleaved_tars", str(data), str(tmp_path / "x")])
    assert "from which pair_tars are made, not interleaved_tars" in capsys.readouterr().err
    (tmp_path / "chat.json").write_text('[{"conversations": []}]')
    with pytest.raises(SystemExit):
        main(["data", "build", "pair_tars", str(tmp_path / "chat.json"), str(tmp_path / "x")])
    assert "only pairs and interleaved documents are built" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"samples_per_shard": 0}, {"max_side": 0}, {"quality": 96}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BuildSettings(**settings)


def test_data_of_which_nothing_can_be_used_is_an_error(tmp_path, capsys):
    data = write_pairs(tmp_path / "data", 2, " ")
    with pytest.raises(SystemExit):
        main(["data", "build", "pair_tars", str(data), str(tmp_path / "tars")])
    assert "could be used" in capsys.readouterr().err
