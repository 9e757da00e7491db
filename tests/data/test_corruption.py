"""Runs over damaged shards: with a little damage they go on with the right counts, with much they stop and say why."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from pathlib import Path

import pytest

from dreamllm.data import (
    BadSampleError,
    Batches,
    LoaderSettings,
    LoaderState,
    Mixture,
    Part,
    ProblemLog,
    TooManyBadSamplesError,
    load_steps,
    make_reader,
)
from tests.data.pictures import png, write_tar
from tests.tiny import tiny_model

SHARDS, PER_SHARD = 20, 10
DAMAGES = {
    "cut": "truncated_archive",
    "header": "truncated_archive",
    "text": "malformed",
    "json": "malformed",
    "picture": "corrupt_image",
    "no bytes": "corrupt_image",
    "bomb": "oversized",
    "twice": "duplicate_key",
    "no caption": "missing_caption",
    "no picture": "missing_image",
}
"""What is done to one sample, or the end, of a shard -> the reason under which it is counted."""


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))[1]


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels: only its header."""
    whole = bytearray(png(0))
    whole[16:24] = (30000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


def write_shard(path: Path, number: int, damages: dict[int, str], bomb: bytes) -> None:
    members: dict[str, bytes] = {}
    for i in range(PER_SHARD):
        damage = damages.get(i)
        key = f"{number:02d}_{i}"
        members[f"{key}.png"] = {"picture": b"broken", "no bytes": b"", "bomb": bomb}.get(damage, png(i))
        if damage == "json":
            members[f"{key}.json"] = b'{"caption": '
        elif damage != "no caption":
            members[f"{key}.txt"] = b"\xff\xfe" if damage == "text" else b"a caption"
        if damage == "no picture":
            del members[f"{key}.png"]
    write_tar(path, members)
    for i, damage in damages.items():
        if damage == "twice":
            _append(path, f"{number:02d}_{i}.png")
        elif damage == "header":
            _damage_header(path, f"{number:02d}_{i}.png")
        elif damage == "cut":
            _cut(path, f"{number:02d}_{i}.txt")


def _append(path: Path, name: str) -> None:
    other = write_tar(path.with_suffix(".more"), {name: png(99)})
    data = path.read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    path.write_bytes(data + other.read_bytes())
    other.unlink()


def _damage_header(path: Path, name: str) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(name.encode()) + 60] ^= 1
    path.write_bytes(data)


def _cut(path: Path, name: str) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.index(name.encode()) + 512 + 3])


def outcomes(reader) -> Counter:
    return Counter(outcome(reader, i) for i in range(len(reader)))


def outcome(reader, index: int) -> str:
    try:
        reader.document(index)
    except BadSampleError as error:
        return error.reason
    return "fine"


@pytest.mark.parametrize("damage", sorted(set(DAMAGES) - {"picture", "bomb"}))
def test_each_kind_of_damage_costs_one_sample_and_is_counted_by_its_reason(tmp_path, bomb, damage):
    at = PER_SHARD - 1 if damage == "cut" else 4
    write_shard(tmp_path / "0.tar", 0, {at: damage}, bomb)
    counts = outcomes(make_reader("pair_tars", tmp_path / "0.tar", mode="creation"))
    assert counts["fine"] == PER_SHARD - 1
    assert counts[DAMAGES[damage]] >= 1
    assert sum(counts.values()) <= PER_SHARD + 1  # a damaged header makes two: its place, and the caption left alone


def damaged_shards(folder: Path, share: float, bomb: bytes, kinds: list[str]) -> Counter:
    """Shards of which `share` of the samples are damaged; how many of each reason."""
    folder.mkdir()
    numbers = random.Random(0)
    total = round(share * SHARDS * PER_SHARD)
    places = numbers.sample(range(SHARDS * PER_SHARD), total)
    wanted: Counter = Counter()
    by_shard: dict[int, dict[int, str]] = {}
    for n, place in enumerate(places):
        kind = kinds[n % len(kinds)]
        by_shard.setdefault(place // PER_SHARD, {})[place % PER_SHARD] = kind
        wanted[DAMAGES[kind]] += 1
    for number in range(SHARDS):
        write_shard(folder / f"{number:02d}.tar", number, by_shard.get(number, {}), bomb)
    return wanted


def run(batches: Batches, log: ProblemLog, workers: int = 0) -> None:
    for (loaded,) in load_steps(batches, range(1), 1, LoaderState.initial(1), workers, steps=SHARDS):
        log.add(loaded.batch.num_documents, loaded.problems)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_slightly_damaged_shards_goes_on_with_the_right_counts(tmp_path, processor, bomb, workers):
    kinds = ["text", "json", "picture", "no bytes", "bomb", "twice", "no caption", "no picture"]
    wanted = damaged_shards(tmp_path / "data", 0.05, bomb, kinds)
    reader = make_reader("pair_tars", tmp_path / "data", mode="comprehension")
    assert len(reader) == SHARDS * PER_SHARD
    batches = Batches(Mixture([Part(reader)], seed=3), processor, LoaderSettings(10))
    log = ProblemLog(max_bad_fraction=0.1, min_documents=50)
    run(batches, log, workers)
    # Each position is drawn once in an epoch; a replacement may meet another damaged sample.
    assert set(log.counts) == set(wanted)
    assert sum(wanted.values()) == 10
    assert all(log.counts[reason] >= count for reason, count in wanted.items())
    assert log.bad <= sum(wanted.values()) + 3
    assert log.documents == SHARDS * PER_SHARD + log.bad


def test_a_run_over_badly_damaged_shards_stops_with_examples(tmp_path, processor, bomb):
    damaged_shards(tmp_path / "data", 0.5, bomb, ["text", "picture", "bomb", "twice"])
    reader = make_reader("pair_tars", tmp_path / "data", mode="comprehension")
    batches = Batches(Mixture([Part(reader)], seed=3), processor, LoaderSettings(10))
    log = ProblemLog(max_bad_fraction=0.1, min_documents=50)
    with pytest.raises(TooManyBadSamplesError, match=r"(?s)more than the tolerated 10%.*for example .*\.tar:") as error:
        run(batches, log)
    assert log.documents < SHARDS * PER_SHARD
    for reason in ("malformed", "corrupt_image", "oversized", "duplicate_key"):
        assert f"{reason}: " in str(error.value)


def test_files_that_are_no_tars_are_told_and_counted(tmp_path, bomb):
    for number in range(20):
        write_shard(tmp_path / f"{number:02d}.tar", number, {}, bomb)
    (tmp_path / "00.tar").write_bytes(b"")
    (tmp_path / "07.tar").write_bytes(b"<html>404 not found</html>" * 50)
    with pytest.warns(
        UserWarning, match=r"0[07]\.tar is not an uncompressed tar.*all its samples are lost, and counted"
    ) as told:
        reader = make_reader("auto", tmp_path, mode="creation")
    assert len(told) == 2
    assert outcomes(reader) == {"fine": 18 * PER_SHARD, "truncated_archive": 2}
    (tmp_path / "08.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00\.tar is not an uncompressed tar: it is empty; so are 2 more of 20 tars"):
        make_reader("pair_tars", tmp_path)


def test_tars_without_samples_do_not_hide_what_the_others_hold(tmp_path):
    write_tar(tmp_path / "0.tar", {})
    write_tar(tmp_path / "1.tar", {"a.json": b'{"text_list": ["Once."]}'})
    assert make_reader("auto", tmp_path).document(0).text() == "Once."
