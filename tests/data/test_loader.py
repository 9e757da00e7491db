"""Batches by number: the same from any process, at any moment, and what happens to samples that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest
import torch

from dreamllm.data import (
    Batches,
    Conversations,
    DocumentList,
    Interleaved,
    LaneState,
    LoaderSettings,
    LoaderState,
    Mixture,
    Pairs,
    Part,
    ProblemLog,
    TooManyBadSamplesError,
    load_steps,
    open_pairs,
)
from dreamllm.data.problems import Problem
from dreamllm.documents import PLAIN, Document, End, PackedBatch, Picture, Text, load_picture
from tests.data.pictures import png, write_jsonl, write_pairs, write_tar
from tests.tiny import random_picture, tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))[1]


def batches(reader, processor, count=4, seed=0, **settings) -> Batches:
    return Batches(Mixture([Part(reader)], seed), processor, LoaderSettings(count, **settings))


def loaded(made: Batches, start: int, stop: int, workers: int = 0):
    """Batches `start` to `stop` - 1 of a run of one lane."""
    state = LoaderState({0: LaneState(start)})
    for (batch,) in load_steps(made, range(1), 1, state, workers, steps=stop - start):
        yield batch


def assert_equal(a: PackedBatch, b: PackedBatch) -> None:
    assert a.names == b.names
    for name in ("input_ids", "labels", "splice_index", "pixel_values", "target_pixel_values"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_workers_and_starting_point_do_not_change_a_batch(tmp_path, processor, kind):
    if kind == "folder":
        data = write_pairs(tmp_path / "data", 10)
    else:
        data = write_tar(
            tmp_path / "a.tar", {f"{i}.{s}": d for i in range(10) for s, d in (("png", png(i)), ("txt", b"x"))}
        )
    made = batches(Pairs(open_pairs(data), "both"), processor)
    straight = list(loaded(made, 0, 8))
    assert [batch.number for batch in straight] == list(range(8))
    for other in (loaded(made, 0, 8, workers=2), (made[i] for i in range(8))):
        for a, b in zip(straight, other, strict=True):
            assert_equal(a.batch, b.batch)
    for a, b in zip(straight[5:], loaded(made, 5, 8, workers=1), strict=True):
        assert_equal(a.batch, b.batch)


class Parents(DocumentList):
    """Documents named after the parent of the process that makes them."""

    def document(self, index: int, epoch: int = 0) -> Document:
        return Document((Text("x"), End()), name=str(os.getppid()))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize("settings", [{"documents_per_batch": 2}, {"tokens_per_batch": 256, "look_ahead": 2}])
def test_workers_are_children_of_the_process_that_they_work_for(processor, settings):
    """Also where Python starts others from a server: a worker of which that is the parent outlives a killed process."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        made = Batches(Mixture([Part(Parents([None] * 4, "parents"))], 0), processor, LoaderSettings(**settings))
        for loaded_batch in loaded(made, 0, 3, workers=2):
            assert set(loaded_batch.batch.names) == {str(os.getpid())}
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_the_empty_prompt_is_appended_on_request(tmp_path, processor):
    reader = Pairs(open_pairs(write_pairs(tmp_path, 4)), "creation")
    with_null = batches(reader, processor, with_null=True)[0].batch
    assert with_null.null_positions is not None
    assert batches(reader, processor)[0].batch.null_positions is None
    assert with_null.names == batches(reader, processor)[0].batch.names


def test_only_pictures_to_create_are_mirrored(tmp_path, processor):
    reader = DocumentList(
        [Document((Picture(random_picture(i, 8), True, True), Text("x"), End()), name=str(i)) for i in range(8)], "both"
    )
    plain = batches(reader, processor, count=8)[0].batch
    flipped = batches(reader, processor, count=8, flip_targets=True)
    assert torch.equal(flipped[0].batch.pixel_values, plain.pixel_values)
    same = [
        torch.equal(a, b) for a, b in zip(flipped[0].batch.target_pixel_values, plain.target_pixel_values, strict=True)
    ]
    mirrored = [
        torch.equal(a, b.flip(-1))
        for a, b in zip(flipped[0].batch.target_pixel_values, plain.target_pixel_values, strict=True)
    ]
    assert all(s != m for s, m in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < 8
    assert_equal(flipped[0].batch, flipped[0].batch)


def test_an_unusable_sample_is_replaced_and_reported(tmp_path, processor):
    data = write_pairs(tmp_path, 9)
    (data / "3.png").write_bytes(png(3)[:60])
    (data / "5.txt").write_text("")
    (data / "7.png").unlink()
    made = batches(Pairs(open_pairs(data), "comprehension"), processor, count=9)
    loaded = made[0]
    assert loaded.batch.num_documents == 9
    assert sorted(p.reason for p in loaded.problems) == ["corrupt_image", "empty_caption", "missing_image"]
    assert any("3.png" in p.message for p in loaded.problems)
    assert not {name.rpartition("/")[2] for name in loaded.batch.names} & {"3.png", "5.png", "7.png"}


def test_a_picture_missing_at_reading_time_is_named(tmp_path, processor):
    reader = Pairs(open_pairs(write_pairs(tmp_path, 3)), "creation")
    (tmp_path / "1.png").unlink()
    reasons = [p.reason for n in range(3) for p in batches(reader, processor, count=1)[n].problems]
    assert reasons == ["missing_image"]


def test_a_long_caption_is_trimmed_and_counted(tmp_path, processor):
    reader = Pairs(open_pairs(write_pairs(tmp_path, 2, "very long " * 500)), "both")
    loaded = batches(reader, processor, count=2)[0]
    assert [p.reason for p in loaded.problems] == ["trimmed", "trimmed"]
    assert loaded.batch.max_seqlen == processor.layout.max_length
    log = ProblemLog(max_bad_fraction=0.0, min_documents=1)
    log.add(2, loaded.problems)
    assert log.bad == 0
    assert log.counts == {"trimmed": 2}


def test_an_interleaved_document_loses_only_the_unreadable_picture(tmp_path, processor):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(png(0))
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    info = [{"image_name": f"{i}.png", "matched_text_index": i} for i in range(3)]
    path = write_jsonl(tmp_path / "docs.jsonl", [{"text_list": ["one", "two", "three", "four"], "image_info": info}])
    loaded = batches(Interleaved(path), processor, count=1)[0]
    assert [p.reason for p in loaded.problems] == ["lost_picture", "lost_picture"]
    assert loaded.batch.target_pixel_values.shape[0] == loaded.batch.pixel_values.shape[0] == 1
    whole = DocumentList(
        [
            Document(
                (Text("one"), Picture(png(0), True, True), Text("two"), Text("three"), Text("four"), End()), name="x"
            )
        ],
        "x",
    )
    assert torch.equal(loaded.batch.input_ids, batches(whole, processor, count=1)[0].batch.input_ids)


def test_a_document_of_which_nothing_fits_is_left_out(processor):
    stub = Document((Text("word " * 3000), End()), "stop", "stub")
    good = Document((Text("fine"), End()), "stop", "good")
    loaded = batches(DocumentList([stub, good], "mixed"), processor, count=2)[0]
    assert loaded.batch.names == ("good", "good")
    assert [p.reason for p in loaded.problems] == ["nothing_to_learn"]
    assert "within 256 tokens" in loaded.problems[0].message


def test_pictures_that_alone_exceed_the_context_are_left_out(processor):
    too_many = Document((*[Picture(png(0), True)] * 60, Text("x"), End()), "trim", "crowd")
    loaded = batches(DocumentList([too_many, Document((Text("fine"), End()), name="good")], "m"), processor, count=2)[0]
    assert [p.reason for p in loaded.problems] == ["too_long"]


@pytest.mark.parametrize(("slots", "pictures"), [("<dream> <dream>", ["0.png"]), ("<dream>", ["0.png", "0.png"])])
def test_dream_slots_and_targets_that_do_not_match_are_left_out(tmp_path, processor, slots, pictures):
    (tmp_path / "0.png").write_bytes(png(0))
    turns = [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": slots}]
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    write_jsonl(tmp_path / "chat.json", [[{"image": pictures, "conversations": turns}, good]])
    loaded = batches(Conversations(tmp_path / "chat.json", PLAIN), processor, count=2)[0]
    assert [p.reason for p in loaded.problems] == ["picture_slots"]
    assert "placeholders but" in loaded.problems[0].message


@pytest.mark.parametrize("change", ["more slots", "more targets"])
def test_an_encoded_document_with_unmatched_slots_is_refused(processor, change):
    encoded = processor.encode(Document((Text("x"), Picture(png(0), creation=True), End()), name="pair 7"))
    encoded.targets = [] if change == "more slots" else [png(0), png(0)]
    with pytest.raises(ValueError, match=r"pair 7 has 1 dream slots but [02] target pictures"):
        processor.pack([encoded])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_stops_after_too_many_unusable_samples_in_a_row(tmp_path, processor, workers):
    data = write_pairs(tmp_path, 3)
    for i in range(3):
        (data / f"{i}.png").write_bytes(b"not a picture")
    made = batches(Pairs(open_pairs(data), "both"), processor, max_consecutive_bad=6)
    with pytest.raises(TooManyBadSamplesError, match=r"(?s)^6 samples of .* in a row.*corrupt_image.*0\.png"):
        list(loaded(made, 0, 1, workers))


def test_a_run_stops_when_too_large_a_share_is_unusable():
    log = ProblemLog(max_bad_fraction=0.1, min_documents=50)
    bad = Problem("corrupt_image", "x.png is corrupt")
    for _ in range(9):
        log.add(4, [bad])
    with pytest.raises(
        TooManyBadSamplesError, match=r"(?s)10 of 50 samples.*10%.*corrupt_image: 10, for example x\.png"
    ):
        log.add(4, [bad])


def test_counts_survive_a_resume():
    log = ProblemLog()
    log.add(4, [Problem("corrupt_image", "a"), Problem("corrupt_image", "b"), Problem("trimmed", "c")])
    again = ProblemLog()
    again.load_state_dict(log.state_dict())
    assert again == log
    assert again.documents == 6
    assert again.bad == 2


def test_pictures_are_decoded_once_per_document(tmp_path, processor, monkeypatch):
    read = []
    monkeypatch.setattr(
        "dreamllm.data.preparation.load_picture", lambda source: read.append(source) or load_picture(source)
    )
    document = Document((Picture(png(0), True, True), Text("x"), End()), name="x")
    batches(DocumentList([document], "one"), processor, count=1)[0]
    assert len(read) == 1
