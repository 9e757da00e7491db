"""The index of tars: the same samples as a scan, bounded memory, and what happens when it no longer fits."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dreamllm.cli import main
from dreamllm.data import BadSampleError, TarPairs, make_reader, open_data
from dreamllm.data import archive as archive_module
from dreamllm.data.records import stamp
from dreamllm.data.tar_index import SampleTable, TarIndex, _IndexWriter, cached_index_path, index_path, write_index
from dreamllm.data.tar_scan import Member
from dreamllm.data.tars import group_pairs
from tests.data.pictures import png, write_tar

ROOT = Path(__file__).parents[2]


def write_tars(folder: Path, counts: tuple[int, ...] = (3, 0, 5)) -> Path:
    for number, count in enumerate(counts):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        members = {}
        for i in range(count):
            members |= {f"k{i}.jpg": png(i), f"k{i}.txt": f"caption {number} {i}".encode()}
        write_tar(folder / ("sub" if number else "") / f"{number}.tar", members)
    return folder


def scanning_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(archive_module, "walk", lambda path: pytest.fail(f"{path} was scanned"))


def test_indexed_and_scanned_tars_give_the_same_pairs(tmp_path, monkeypatch, capsys):
    data = write_tars(tmp_path / "data")
    scanned = open_data(data)
    main(["data", "index", str(data)])
    assert "pairs.dreamllm-index: 8 pairs in 3 tars" in capsys.readouterr().out
    scanning_is_an_error(monkeypatch)
    indexed = make_reader("pair_tars", data)
    assert len(indexed) == len(scanned) == 8
    for again in (indexed, pickle.loads(pickle.dumps(indexed))):
        assert [again.source.pair(i) for i in range(8)] == [scanned.source.pair(i) for i in range(8)]
    with pytest.raises(IndexError):
        indexed.source.pair(8)
    assert sorted(p.name for p in data.iterdir()) == ["0.tar", "pairs.dreamllm-index", "sub"]


def test_an_index_of_one_tar_lies_beside_it(tmp_path, monkeypatch):
    write_tars(tmp_path)
    main(["data", "index", str(tmp_path / "0.tar")])
    assert (tmp_path / "0.tar.pairs.dreamllm-index").is_file()
    scanning_is_an_error(monkeypatch)
    assert len(TarPairs([tmp_path / "0.tar"], root=tmp_path / "0.tar")) == 3


def test_the_file_is_in_the_safetensors_format(tmp_path):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    arrays = load_file(data / "pairs.dreamllm-index")
    assert arrays["samples"].tolist() == [2, 4, 6, 2, 4, 6, 8, 10]
    assert bytes(arrays["text"]).startswith(b"k0.jpgk0.txtk1.jpg")
    with open(data / "0.tar", "rb") as file:
        offset, size = arrays["members"][1].tolist()
        file.seek(offset)
        assert file.read(size) == b"caption 0 0"


@pytest.mark.parametrize("change", ["another time", "another size", "a new tar"])
def test_a_stale_index_is_told_and_only_what_changed_is_scanned(tmp_path, monkeypatch, change):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    changed = data / "sub" / ("2.tar" if change != "a new tar" else "9.tar")
    if change == "another time":
        os.utime(changed, ns=(1, 1))
    else:
        write_tar(changed, {"new.jpg": png(9), "new.txt": b"new caption"})
    walked = []
    walk = archive_module.walk
    monkeypatch.setattr(archive_module, "walk", lambda path: walked.append(path) or walk(path))
    with pytest.warns(
        UserWarning, match=rf"does not describe 1 of \d tars as they are.*{changed.name}.*dreamllm data index"
    ):
        source = TarPairs(sorted(data.rglob("*.tar")), root=data)
    assert walked == [changed]
    wanted = "caption 2 4" if change == "another time" else "new caption"
    assert source.pair(len(source) - 1).caption == wanted
    main(["data", "index", str(data)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TarPairs(sorted(data.rglob("*.tar")), root=data)._archive.indexed == len(list(data.rglob("*.tar")))


def test_indexing_again_keeps_what_is_known(tmp_path, monkeypatch):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    before = (data / "pairs.dreamllm-index").read_bytes()
    monkeypatch.setattr("dreamllm.data.tar_index.walk", lambda path: pytest.fail("scanned again"))
    main(["data", "index", str(data)])
    assert (data / "pairs.dreamllm-index").read_bytes() == before


def test_a_large_set_without_an_index_says_so(tmp_path, monkeypatch):
    data = write_tars(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_reader("pair_tars", data)
    monkeypatch.setattr(archive_module, "LOUD_BYTES", 1000)
    with pytest.warns(
        UserWarning, match=r"3 tars \(.*MB\) have no index and are scanned at every start; run `dreamllm data"
    ):
        make_reader("pair_tars", data)


@pytest.mark.parametrize("damage", ["cut", "text", "another version"])
def test_an_unusable_index_is_told_and_not_used(tmp_path, damage):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    path = data / "pairs.dreamllm-index"
    whole = path.read_bytes()
    broken = {"cut": whole[:-7], "text": b"hello", "another version": whole.replace(b"tar index 1", b"tar index 0")}
    path.write_bytes(broken[damage])
    with pytest.warns(UserWarning, match="is not a whole index of this version.*scanned instead"):
        assert len(make_reader("pair_tars", data)) == 8
    main(["data", "index", str(data)])
    assert path.read_bytes() == whole


def test_a_tar_that_changes_or_vanishes_in_use_is_a_bad_sample(tmp_path):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    source = make_reader("pair_tars", data).source
    assert source.pair(0).caption == "caption 0 0"
    write_tar(data / "0.tar", {"other.jpg": png(1), "other.txt": b"not this"})
    (data / "sub" / "2.tar").unlink()
    for index, words in ((0, "was changed after it was opened"), (7, "has disappeared")):
        with pytest.raises(BadSampleError, match=words) as error:
            source.pair(index)
        assert error.value.reason == "changed_file"


def test_a_replaced_index_goes_on_serving_who_has_opened_it(tmp_path):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    used, waiting = make_reader("pair_tars", data).source, make_reader("pair_tars", data).source
    used.pair(0)
    write_tar(data / "sub" / "00.tar", {"a.jpg": png(0), "a.txt": b"first"})
    main(["data", "index", str(data)])
    assert used.pair(7).caption == "caption 2 4"
    with pytest.raises(ValueError, match="was replaced after it was opened; start again"):
        waiting.pair(7)


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = write_tars(tmp_path / "data")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != data and access(path, mode))  # root may always
    main(["data", "index", str(data)])
    assert not index_path(data, "pairs").exists()
    assert cached_index_path(data, "pairs").is_relative_to(tmp_path / "home" / ".cache" / "dreamllm")
    scanning_is_an_error(monkeypatch)
    assert len(make_reader("pair_tars", data)) == 8


def test_the_folder_of_the_index_can_be_chosen(tmp_path, monkeypatch):
    data = write_tars(tmp_path / "data")
    main(["data", "index", str(data), "--out", str(tmp_path / "indices")])
    scanning_is_an_error(monkeypatch)
    assert len(make_reader("pair_tars", data, index_folder=str(tmp_path / "indices"))) == 8


def test_forked_processes_share_an_index_that_was_read(tmp_path):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    source = make_reader("pair_tars", data).source
    expected = [source.pair(i) for i in range(8)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(source.pair, list(range(8)) * 20, chunksize=1) == expected * 20


def _index(data: str) -> None:
    main(["data", "index", data])


def test_many_processes_may_index_at_once(tmp_path):
    data = write_tars(tmp_path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_index, args=(str(data),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(p.name for p in data.iterdir()) == ["0.tar", "pairs.dreamllm-index", "sub"]
    assert len(TarIndex(data / "pairs.dreamllm-index").tars) == 3


def test_a_scan_that_fails_leaves_the_old_index(tmp_path, capsys):
    data = write_tars(tmp_path)
    main(["data", "index", str(data)])
    before = (data / "pairs.dreamllm-index").read_bytes()
    (data / "sub" / "3.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(SystemExit):
        main(["data", "index", str(data)])
    assert "3.tar is not an uncompressed tar" in capsys.readouterr().err
    assert (data / "pairs.dreamllm-index").read_bytes() == before
    assert sorted(p.name for p in data.iterdir()) == ["0.tar", "pairs.dreamllm-index", "sub"]


def test_random_tables_come_back(tmp_path):
    rng = np.random.default_rng(0)
    tars, tables = [], []
    with _IndexWriter(tmp_path / "i") as writer:
        for number in range(6):
            groups = [
                [
                    Member(rng.bytes(rng.integers(1, 40)), int(rng.integers(0, 1 << 40)), int(rng.integers(0, 1 << 33)))
                    for _ in range(rng.integers(1, 5))
                ]
                for _ in range(rng.integers(0, 9))
            ]
            tars.append(groups)
            tables.append(SampleTable.of(groups))
            writer.add(f"{number}.tar", (number, number), tables[-1])
        writer.finish()
    index = TarIndex(tmp_path / "i")
    assert [tar.samples for tar in index.tars] == [len(groups) for groups in tars]
    for number, groups in enumerate(tars):
        for i, group in enumerate(groups):
            assert index.table(number).sample(i) == tables[number].sample(i) == tuple(group)


USE_A_LARGE_INDEX = """
import os, random, sys, time
from dreamllm.data.archive import Archive
from dreamllm.data.tars import group_pairs
from pathlib import Path

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

tars = sorted(Path(sys.argv[1]).glob("*.tar"))
before = resident()
archive = Archive(tars, "pairs", group_pairs, Path(sys.argv[1]))
assert archive.indexed == len(tars)
most = resident()
numbers = random.Random(0)
for _ in range(20_000):
    i = numbers.randrange(len(archive))
    sample = archive.sample(i)
    local = i % 1_000_000
    assert sample.members[0].name == b"%09d.jpg" % local and sample.members[1].offset == 2048 * local + 1536, i
    most = max(most, resident()) if _ % 50 == 0 else most
print(len(archive), most - before)
"""


def test_ten_million_samples_need_little_memory(tmp_path):
    """A synthetic index: ten sparse tars that are never read, a million samples in each."""
    count = 1_000_000
    local = np.arange(count, dtype=np.uint64)
    members = np.empty((2 * count, 2), np.uint64)
    members[0::2, 0], members[1::2, 0] = 2048 * local + 512, 2048 * local + 1536
    members[:, 1] = 100
    digits = np.char.zfill(local.astype("S9"), 9)
    names = np.char.add(np.repeat(digits, 2), np.tile(np.array([b".jpg", b".txt"]), count))
    table = SampleTable(
        members,
        np.arange(13, 13 * (2 * count + 1), 13, dtype=np.uint32),
        np.arange(2, 2 * count + 1, 2, dtype=np.uint32),
        np.frombuffer(names.tobytes(), np.uint8),
    )
    with _IndexWriter(index_path(tmp_path, "pairs")) as writer:
        for number in range(10):
            tar = tmp_path / f"{number}.tar"
            with open(tar, "wb") as file:
                file.truncate(1 << 31)
            writer.add(tar.name, stamp(tar), table)
        writer.finish()
    assert index_path(tmp_path, "pairs").stat().st_size > 600_000_000
    command = [sys.executable, "-c", USE_A_LARGE_INDEX, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    samples, grown = map(int, ended.stdout.split())
    assert samples == 10_000_000
    assert grown < 200_000_000


def test_looking_a_sample_up_does_not_depend_on_how_many_there_are(tmp_path, monkeypatch):
    """By work, not by the clock: how often and how many bytes are read."""
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: read.append(size) or pread(file, size, offset))
    costs = []
    for count in (10, 10_000):
        tar = write_tar(tmp_path / f"{count}.tar", {f"{i:06d}.txt": b"x" for i in range(count)})
        write_index([tar], "pairs", group_pairs, tar, index_path(tar, "pairs"))
        archive = archive_module.Archive([tar], "pairs", group_pairs, tar)
        read.clear()
        assert archive.sample(count - 1).members[0].name == f"{count - 1:06d}.txt".encode()
        costs.append((len(read), sum(read)))
    assert costs[0] == costs[1]
    assert costs[0][0] <= 4
