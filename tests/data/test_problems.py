"""Counting what went wrong: the limit, and what it does not apply to."""

from __future__ import annotations

import pytest

from dreamllm.data import BadSampleError, FilteredSampleError, Problem, ProblemLog, TooManyBadSamplesError
from dreamllm.data.preparation import prepare
from dreamllm.documents import Document, End, Text
from tests.tiny import tiny_model


def test_filtered_samples_are_counted_but_do_not_stop_a_run():
    log = ProblemLog(max_bad_fraction=0.1, min_documents=10)
    for _ in range(50):
        log.add(1, [Problem("small_picture", "tiny"), Problem("other_language", "deutsch")])
    assert (log.documents, log.bad, log.filtered) == (50, 0, 100)
    assert log.counts == {"small_picture": 50, "other_language": 50}
    assert "small_picture: 50, for example tiny" in log.summary()


def test_filtered_samples_do_not_hide_bad_ones():
    log = ProblemLog(max_bad_fraction=0.1, min_documents=10)
    with pytest.raises(TooManyBadSamplesError, match="2 of 12 samples"):
        log.add(10, [Problem("small_picture", "tiny")] * 100 + [Problem("corrupt_image", "broken")] * 2)


def test_a_filter_is_no_reason_for_a_bad_sample():
    assert isinstance(FilteredSampleError("url_caption", "x"), BadSampleError)
    with pytest.raises(AssertionError):
        FilteredSampleError("corrupt_image", "x")


def test_what_a_reader_left_out_of_a_document_is_reported(tmp_path):
    processor = tiny_model(tmp_path)[1]
    document = Document((Text("fine"), End()), name="d", remarks=(("lost_picture", "d: 1.jpg is not in the tar"),))
    assert prepare(document, processor).problems == [Problem("lost_picture", "d: 1.jpg is not in the tar")]
    assert document == Document((Text("fine"), End()), name="d")
