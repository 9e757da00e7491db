"""`dreamllm evaluate digits`: the figures of the recipe's evaluation, from the code of the large benchmarks."""

import json

import pytest

from dreamllm.cli import main
from dreamllm.evaluation import digits_run
from dreamllm.evaluation.digits import DigitsOptions, evaluate_digits
from dreamllm.evaluation.digits_judge import DigitsJudge
from dreamllm.evaluation.digits_scans import Scans, load_scans
from dreamllm.evaluation.metrics import feature_statistics, frechet_distance
from dreamllm.evaluation.run import RunOptions
from dreamllm.inference import DrawingOptions, load
from tests.tiny import tiny_model

SETTINGS = DigitsOptions(
    created_per_digit=2,
    counting_documents=8,
    captions=("{article} {word}", "the {word}"),
    counting_text="",
    instructions=("Count",),
    drawing=DrawingOptions(steps=2, guidance_scale=2.0, scheduler="ddim"),
    max_new_tokens=3,
    batch_size=16,
)


@pytest.fixture(scope="module")
def scans():
    train, unseen = load_scans()
    return train, Scans(unseen.pictures[:30], unseen.labels[:30])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_model(folder)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def run(monkeypatch, tmp_path, scans, model):
    monkeypatch.setattr(digits_run, "load_scans", lambda: scans)
    return lambda **changed: digits_run.run_digits(
        RunOptions(model, tmp_path, tmp_path / "out", **{"batch_size": 7} | changed), SETTINGS
    )


def test_figures_are_those_of_the_recipes_evaluation(run, scans, model, tmp_path):
    results = run()
    train, unseen = scans
    judge = DigitsJudge(train.pictures, train.labels)
    evaluation = evaluate_digits(load(model), unseen.pictures, unseen.labels, judge, SETTINGS)
    expected = evaluation.results.to_json()
    for name, found in results["proportions"].items():
        assert found["right"] == expected[name]["right"], name
        assert found["total"] == expected[name]["total"], name
    drawn, real = (
        feature_statistics(digits_run._features(judge, p)) for p in (evaluation.samples.created, unseen.pictures)
    )
    assert results["figures"][-1]["value"] == pytest.approx(frechet_distance(drawn, real))
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [r["answer"] for r in records if r["kind"] == "caption"] == list(evaluation.samples.captions)
    assert [r["judged"] for r in records if r["kind"] == "creation"] == evaluation.samples.judged.tolist()
    assert "drawn for: a zero" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_goes_on_where_it_was_ended(run, tmp_path, monkeypatch):
    results = run()
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    answers = out / "reading" / "answers-00000-of-00001.jsonl"
    answers.write_bytes(answers.read_bytes()[:500])
    (out / "creation" / "answers-00000-of-00001.jsonl").unlink()
    (out / "counting.json").unlink()
    assert run() == results
    assert {path: path.read_bytes() for path in before} == before


def test_options_that_have_no_meaning_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["evaluate", "digits", "--model", str(tmp_path), "--data", str(tmp_path), "--limit", "3"])
    assert "evaluated in its own way, by one process; leave --data, --limit away" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "digits"])
    assert "needs --model" in capsys.readouterr().err
