"""Planning by tokens reads texts alone: outlines are as long as their documents, and no picture of a tar is read."""

from __future__ import annotations

import json

import pytest

from dreamllm.data import (
    Batches,
    CaptionInstructions,
    Filters,
    LoaderSettings,
    LoaderState,
    Mixture,
    Pairs,
    Part,
    TarInterleaved,
    load_steps,
    make_reader,
    open_pairs,
)
from dreamllm.data.archive import TarSample
from dreamllm.documents import VICUNA_V1_1
from tests.data.pictures import png, write_tar
from tests.tiny import tiny_model

COUNT = 12


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))[1]


@pytest.fixture
def tar_of_pairs(tmp_path):
    members = {}
    for i in range(COUNT):
        members |= {f"{i:02d}.png": png(i, 16 if i % 3 else 32), f"{i:02d}.txt": b"word " * (1 + 3 * i)}
    return write_tar(tmp_path / "pairs.tar", members)


@pytest.fixture
def tar_of_documents(tmp_path):
    members = {}
    for i in range(COUNT):
        info = [{"image_name": f"p{k}.png", "matched_text_index": k} for k in range(1 + i % 3)]
        values = {"text_list": ["some words " * (1 + i)] * 3, "image_info": info}
        members[f"d{i:02d}.json"] = json.dumps(values).encode()
        members |= {
            f"d{i:02d}-p{k}.png": png(10 * i + k) for k in range(i % 3)
        }  # of each document, the last is missing
    return write_tar(tmp_path / "documents.tar", members)


def readers(pairs, documents, **filters):
    chosen = Filters(**filters)
    return [
        make_reader("pair_tars", pairs, mode="both", filters=chosen),
        CaptionInstructions(open_pairs(pairs), VICUNA_V1_1),
        TarInterleaved([documents], filters=chosen),
    ]


@pytest.fixture
def members_read(monkeypatch):
    """The suffixes of all members of tars that are read."""
    read, original = [], TarSample.read

    def noting(self, members, name):
        read.extend(member.name.rpartition(b".")[2].decode() for member in members)
        return original(self, members, name)

    monkeypatch.setattr(TarSample, "read", noting)
    return read


@pytest.mark.parametrize("filters", [{}, {"min_size": 7}], ids=["all", "filtered"])
def test_an_outline_is_as_long_as_its_document(tar_of_pairs, tar_of_documents, processor, filters):
    for reader in readers(tar_of_pairs, tar_of_documents, **filters):
        for index in range(COUNT):
            for epoch in (0, 1):
                whole = processor.encode(reader.document(index, epoch))
                outline = processor.encode(reader.outline(index, epoch))
                assert outline.input_ids == whole.input_ids
                assert outline.dream_starts == whole.dream_starts


def test_planning_reads_no_picture_unless_a_filter_asks_for_it(tar_of_pairs, tar_of_documents, processor, members_read):
    settings = LoaderSettings(tokens_per_batch=300, look_ahead=8)
    for reader in readers(tar_of_pairs, tar_of_documents):
        plans = Batches(Mixture([Part(reader)], 0), processor, settings).plans(0, 1)
        for _ in range(5):
            next(plans)
    assert set(members_read) == {"txt", "json"}
    for reader in readers(tar_of_pairs, tar_of_documents, min_size=7)[::2]:
        members_read.clear()
        next(Batches(Mixture([Part(reader)], 0), processor, settings).plans(0, 1))
        assert "png" in members_read


def test_pictures_that_turn_out_to_be_unreadable_leave_batches_within_their_limits(
    tar_of_pairs, processor, monkeypatch
):
    """Planning cannot know; another document stands in, or the place stays empty."""
    monkeypatch.setattr("dreamllm.data.archive.MAX_MEMBER_BYTES", len(png(0, 32)) // 2)
    reader = Pairs(open_pairs(tar_of_pairs), "creation")
    settings = LoaderSettings(tokens_per_batch=260, look_ahead=8, pictures_per_batch=6)
    batches = Batches(Mixture([Part(reader)], 0), processor, settings)
    problems = []
    for (loaded,) in load_steps(batches, range(1), 1, LoaderState.initial(1), steps=30):
        assert 0 < loaded.batch.num_tokens <= 260
        assert loaded.batch.dream_positions.shape[0] <= 6
        problems += loaded.problems
    assert {problem.reason for problem in problems} == {"oversized", "corrupt_image"}
    assert all("stands in for one" in p.message for p in problems if p.reason == "corrupt_image")
