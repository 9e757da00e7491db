"""METEOR and SPICE: run where their programs are, and otherwise not run, never 0."""

import shutil

import pytest

from dreamllm.evaluation.benchmarks import find_benchmark
from dreamllm.evaluation.metrics import MetricUnavailableError, java, meteor, ptb_tokens, spice

RECORDS = [
    {"prediction": "A brown dog runs.", "references": ["a brown dog running", "the dog runs fast"]},
    {"prediction": "", "references": ["two men in a boat"]},
    {"prediction": "日本 ||| !!", "references": ["two cats on a bed"]},
]


def test_meteor_scores_even_odd_captions():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    candidates = [ptb_tokens(record["prediction"]) for record in RECORDS]
    scores = meteor([*candidates, "two cats on a bed"], [*(r["references"] for r in RECORDS), ["two cats on a bed"]])
    assert len(scores.each) == 4
    assert 0.2 < scores.each[0] < 1
    assert scores.each[1:3] == (0, 0)
    assert scores.each[3] == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [meteor, spice])
def test_a_missing_program_is_said(monkeypatch, metric):
    monkeypatch.setattr(java, "Meteor", None)
    with pytest.raises(MetricUnavailableError, match="pycocoevalcap is not installed"):
        metric(["a"], [["a"]])
    monkeypatch.setattr(java, "Meteor", object)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MetricUnavailableError, match="the program java is not installed"):
        metric(["a"], [["a"]])


def test_spice_never_fetches_its_models(monkeypatch, tmp_path):
    monkeypatch.setattr(java, "Meteor", object)
    monkeypatch.setattr(shutil, "which", lambda _: "java")
    monkeypatch.setattr(java, "spice_folder", lambda: tmp_path)
    with pytest.raises(
        MetricUnavailableError, match=r"its models stanford-corenlp-3.6.0.jar and .*-models.jar are not"
    ):
        spice(["a"], [["a"]])


def test_what_was_not_run_has_no_value(monkeypatch):
    monkeypatch.setattr(java, "Meteor", None)
    figures = {figure.name: figure for figure in find_benchmark("coco-caption").score(RECORDS).figures}
    for name in ("METEOR", "SPICE"):
        assert figures[name].value is None
        assert str(figures[name]) == "not run: pycocoevalcap is not installed"
    assert figures["CIDEr"].value > 0
