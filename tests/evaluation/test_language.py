"""Language tasks through lm-eval: local files, the language model's own log-probabilities."""

import importlib.util
import json

import pytest
import torch

from dreamllm.cli import main
from dreamllm.evaluation.benchmarks.language import data_files, subjects
from dreamllm.evaluation.files import DataFolderError
from dreamllm.inference import load
from tests.tiny import tiny_model

GOALS = [("open a license", "read the terms", "eat the copy"), ("make a copy", "use the work", "you may not")]


def test_files_are_found_by_split(tmp_path):
    for name in ("validation-00000-of-00001.parquet", "train.parquet"):
        (tmp_path / name).write_bytes(b"")
    kind, files = data_files(tmp_path, ("validation",))
    assert (kind, [path.rpartition("/")[2] for path in files["validation"]]) == (
        "parquet",
        ["validation-00000-of-00001.parquet"],
    )
    with pytest.raises(DataFolderError, match=r"has no test\*.parquet and dev\*.parquet \(or .jsonl\); it holds train"):
        data_files(tmp_path, ("test", "dev"))
    with pytest.raises(DataFolderError, match="no folder of a subject"):
        subjects(tmp_path)
    with pytest.raises(DataFolderError, match="does not exist"):
        subjects(tmp_path / "none")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    tiny, processor = tiny_model(folder)
    tiny.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_piqa_scores_the_sum_of_log_probabilities_without_bos(model, offline, tmp_path, capsys):
    rows = [{"goal": g, "sol1": a, "sol2": b, "label": i % 2} for i, (g, a, b) in enumerate(GOALS)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["evaluate", "piqa", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")])
    assert "accuracy" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    engine = load(model).engine
    for record, row in zip(records, rows, strict=True):
        context = f"Question: {row['goal']}\nAnswer:"
        expected = [log_probability(engine, context, f" {row[key]}") for key in ("sol1", "sol2")]
        assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert record["score"] == float(expected.index(max(expected)) == row["label"])
        assert record["target"] == row[("sol1", "sol2")[row["label"]]]
    assert (tmp_path / "out" / "report.html").is_file()


def test_winogrande_is_read_from_what_stands_before_the_same_end(model, offline, tmp_path):
    row = {"sentence": "The copy of _ is a work.", "option1": "law", "option2": "terms", "answer": "2"}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row))
    main(["evaluate", "winogrande", "--model", str(model), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert record["target"] == "The copy of terms"
    assert record["chosen"] in ("The copy of law", "The copy of terms")
    assert record["score"] == float(record["chosen"] == record["target"])


def log_probability(engine, context, continuation):
    """As lm-eval splits it: tokens of both together, less those of the context."""
    tokenizer = engine.processor.tokenizer
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = engine.model.language_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(before), len(ids)))


def test_mmlu_has_five_examples_and_a_figure_per_subject(model, offline, tmp_path):
    row = {"question": "What is a copy?", "choices": ["work", "term", "law", "name"], "answer": 1}
    for subject in ("anatomy", "astronomy"):
        folder = tmp_path / "data" / subject
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("\n".join([json.dumps(row)] * 3))
        (folder / "dev.jsonl").write_text("\n".join([json.dumps(row)] * 5))
    command = ["evaluate", "mmlu", "--model", str(model), "--data", str(tmp_path / "data"), "--limit", "2"]
    main([*command, "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [figure["name"] for figure in results["figures"]] == ["accuracy", "mmlu_anatomy", "mmlu_astronomy"]
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert records[0]["question"].count("What is a copy?") == 6
    assert records[0]["target"] == "B"


def test_a_missing_harness_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("dreamllm.evaluation.command.find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        main(["evaluate", "piqa", "--model", str(tmp_path), "--data", str(tmp_path)])
    assert "PIQA is run by lm-eval; install it with: pip install lm-eval" in capsys.readouterr().err
