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
    for name in ("anatomy", "virology", "all", "auxiliary_train", ".cache"):  # as MMLU is distributed
        (tmp_path / name).mkdir()
    assert subjects(tmp_path) == ["anatomy", "virology"]


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


def log_probability(engine, context, continuation, bos=False):
    """As lm-eval splits it: tokens of both together, less those of the context."""
    tokenizer = engine.processor.tokenizer
    begin = [engine.layout.bos] if bos else []
    before = begin + tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = begin + tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = engine.model.language_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(before), len(ids)))


BOOLQ = {"passage": "The license is a copy.", "question": "is the license a copy", "idx": 0, "label": 1}
SIQA = {
    "context": "They copy the work.",
    "question": "Why?",
    "answerA": "a license",
    "answerB": "a term",
    "answerC": "no law",
    "label": "3",
}


def language_run(benchmark, row, folder, model, *more):
    (folder / "validation.jsonl").write_text(json.dumps(row))
    command = ["evaluate", benchmark, "--model", str(model), "--data", str(folder), "--out", str(folder / "out")]
    main([*command, *more])
    results = json.loads((folder / "out" / "results.json").read_text())
    return results, [json.loads(line) for line in (folder / "out" / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("protocol", ["original", "plain"])
def test_the_protocol_decides_the_prompts_and_the_token_at_the_beginning(model, offline, tmp_path, protocol):
    """Original: an instruction, the question capitalised, No and Yes, no `<s>`. Plain: lm-eval's own, after `<s>`."""
    (tmp_path / "boolq").mkdir()
    results, (record,) = language_run("boolq", BOOLQ, tmp_path / "boolq", model, "--protocol", protocol)
    assert results["protocol"] == protocol
    engine = load(model).engine
    if protocol == "original":
        context = (
            "Choose the answer to the question from yes and no.\nThe license is a copy.\n"
            "Question: Is the license a copy?\nAnswer:"
        )
        expected = [log_probability(engine, context, f" {answer}") for answer in ("No", "Yes")]
        assert results["changes"]["doc_to_choice"] == ["No", "Yes"]
    else:
        context = "The license is a copy.\nQuestion: is the license a copy?\nAnswer:"
        expected = [log_probability(engine, context, f" {answer}", bos=True) for answer in ("no", "yes")]
        assert results["changes"] == {}
    assert record["question"] == context
    assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
    (tmp_path / "siqa").mkdir()
    _, (record,) = language_run("siqa", SIQA, tmp_path / "siqa", model, "--protocol", protocol)
    assert record["question"].count("They copy the work.") == 1
    assert ("Context: " in record["question"]) == (protocol == "original")
    assert record["target"] == "no law"


def test_a_run_that_was_ended_asks_the_rest_only(model, offline, tmp_path, monkeypatch):
    from dreamllm.evaluation.harness.lm_eval_run import LanguageModel

    calls = []
    forward = LanguageModel._model_call

    def counted(self, *args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(None)
        return forward(self, *args, **kwargs)

    rows = [{"goal": f"{goal} {i}", "sol1": a, "sol2": b, "label": 0} for i in range(3) for goal, a, b in GOALS[:1]]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["evaluate", "piqa", "--model", str(model), "--data", str(tmp_path), "--batch-size", "1"]
    main([*command, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(LanguageModel, "_model_call", counted)
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "ended")])
    calls[:] = [None] * 4
    monkeypatch.setattr(LanguageModel, "_model_call", counted)
    main([*command, "--out", str(tmp_path / "ended")])
    assert len(calls) == 4 + 6 - 3
    for name in ("records.jsonl", "results.json"):
        assert (tmp_path / "ended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_examples_that_do_not_fit_are_left_out_whole(model):
    from dreamllm.evaluation.harness.lm_eval_run import LanguageModel, without_first_example

    head = "The following are multiple choice questions (with answers) about law.\n\n"
    examples = [f"What is {i}?\n\nThink.\nA. a\nB. b\nC. c\nD. d\nAnswer: {'ABCD'[i]}\n\n" for i in range(4)]
    question = "What is it?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    context = head + "".join(examples) + question
    for kept in range(3, -1, -1):
        context = without_first_example(context)
        assert context == head + "".join(examples[4 - kept :]) + question
    assert without_first_example(context) is None
    engine = load(model).engine
    harness = LanguageModel(
        pretrained=engine.model.language_model, tokenizer=engine.processor.tokenizer, backend="causal",
        max_length=200, add_bos_token=False,
    )  # fmt: skip
    before, _ = harness._encode_pair(head + "".join(examples) + question, " A")
    fitting = [n for n in range(5) if len(harness.tok_encode(head + "".join(examples[4 - n :]) + question)) < 200]
    assert 0 < max(fitting) < 4
    assert before == harness.tok_encode(head + "".join(examples[4 - max(fitting) :]) + question)


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
    assert (
        "PIQA is run by lm-eval, part of the extra [eval]; install it with: pip install lm-eval"
        in capsys.readouterr().err
    )
