"""The whole way of `dreamllm evaluate` in the published form of every benchmark, and what is said of damaged data."""

import copy
import csv
import json
from pathlib import Path

import pytest
import torch

from dreamllm.cli import main
from dreamllm.evaluation import run as run_module
from dreamllm.evaluation.answerer import ModelAnswerer
from dreamllm.evaluation.benchmarks import find_benchmark
from dreamllm.evaluation.files import DataFolderError
from dreamllm.evaluation.run import RunOptions, load_samples
from dreamllm.inference import Assistant, Engine
from tests.evaluation.folders import COUNT, CREATION_WRITERS, WRITERS
from tests.tiny import tiny_model

EVERY = WRITERS | CREATION_WRITERS
LIMIT = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose end token is likely enough that answers end."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(folder / "parts")
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[model.layout.eos] = 0.9 * torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model", Assistant(Engine(model, processor))


@pytest.mark.parametrize("protocol", ["original", "plain"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_whole_way(name, protocol, model, tmp_path, monkeypatch, capsys):
    folder, assistant = model
    WRITERS[name](tmp_path)
    loaded = lambda options: ModelAnswerer(assistant, options.batch_size)  # noqa: E731
    monkeypatch.setattr(run_module.run_benchmark, "__defaults__", (1, None, loaded))
    out = tmp_path / "out"
    command = ["evaluate", name, "--model", folder, "--data", tmp_path, "--out", out, "--limit", LIMIT]
    main([*map(str, command), "--protocol", protocol])
    benchmark = find_benchmark(name)
    results = json.loads((out / "results.json").read_text())
    assert (results["benchmark"], results["protocol"], results["samples"]) == (name, protocol, LIMIT)
    assert results["prompting"]["request"] == benchmark.prompting[protocol].request
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    samples = benchmark.load(tmp_path)[:LIMIT]
    assert [record["id"] for record in records] == [sample.id for sample in samples]
    assert [tuple(record["references"]) for record in records] == [sample.references for sample in samples]
    for record in records:
        assert record["prediction"] == benchmark.prompting[protocol].cleaned(record["answer"]) or "probe" in record
    said = capsys.readouterr().out
    for figure in results["figures"]:
        shown = f"not run: {figure['reason']}" if figure["value"] is None else f"{figure['value']:.2f}"
        assert shown in said
    assert benchmark.title in (out / "report.html").read_text(encoding="utf-8")
    if benchmark.submission is not None:
        assert submitted(out / benchmark.submission[0]) == [record["id"] for record in records]


def submitted(path):
    """The ids of a submission, each of which has an answer in text."""
    if path.suffix == ".tsv":
        with open(path, encoding="utf-8", newline="") as file:
            rows = [(row["index"], row["prediction"]) for row in csv.DictReader(file, delimiter="\t")]
    else:
        values = json.loads(path.read_text(encoding="utf-8"))
        keys = ("question_id", "image", "questionId")
        rows = (
            [(str(next(row[k] for k in keys if k in row)), row["answer"]) for row in values]
            if isinstance(values, list)
            else list(values.items())
        )
    assert all(isinstance(answer, str) for _, answer in rows)
    return [name for name, _ in rows]


# -- damaged data ------------------------------------------------------------------------------------------------------


def load(name, folder):
    return load_samples(find_benchmark(name), RunOptions(folder, folder, folder / "out"))


def annotation_files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".jsonl", ".tsv") and "train" not in p.name]


@pytest.mark.parametrize("name", EVERY)
def test_a_file_that_is_missing_is_named(name, tmp_path):
    EVERY[name](tmp_path)
    for path in annotation_files(tmp_path):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataFolderError) as caught:
            load(name, tmp_path)
        assert path.name in str(caught.value)
        assert "it holds " in str(caught.value)
        path.write_bytes(content)
    assert len(load(name, tmp_path)) >= 4


@pytest.mark.parametrize("name", EVERY)
def test_a_file_that_was_cut_or_is_something_else_is_described(name, tmp_path):
    EVERY[name](tmp_path)
    for path in annotation_files(tmp_path):
        content = path.read_bytes()
        for other in (content[: len(content) // 2], b"\xff\xfe\x00", b"[1, 2]", b'{"a": 1}', b"null", b'"text"', b""):
            path.write_bytes(other)
            with pytest.raises(DataFolderError) as caught:
                load(name, tmp_path)
            assert path.stem in str(caught.value) or "holds no sample" in str(caught.value)
        path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "mmbench"])
def test_pictures_that_are_missing_are_counted_and_named(name, tmp_path):
    WRITERS[name](tmp_path)
    gone = load(name, tmp_path)[1].picture
    gone.unlink()
    with pytest.raises(DataFolderError) as caught:
        load(name, tmp_path)
    assert f"1 of {COUNT} pictures are missing" in str(caught.value)
    assert f"{gone.parent.name}/{gone.name}" in str(caught.value)
    for path in sorted(gone.parent.iterdir()):
        path.unlink()
    gone.parent.rmdir()
    with pytest.raises(DataFolderError, match=gone.parent.name):
        load(name, tmp_path)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "mmbench"])
def test_a_field_that_is_missing_or_of_another_kind_is_named(name, tmp_path):
    """Any field of any entry: it does not matter, or it is named."""
    EVERY[name](tmp_path)
    named = set()
    for path in annotation_files(tmp_path):
        content = path.read_text()
        lines = path.suffix == ".jsonl" or name.startswith("pope")
        values = [json.loads(line) for line in content.splitlines()] if lines else json.loads(content)
        for field, damaged in damages(values):
            text = "\n".join(map(json.dumps, damaged)) if lines else json.dumps(damaged)
            path.write_text(text)
            try:
                load(name, tmp_path)
            except DataFolderError as error:
                assert repr(field) in str(error) or "missing" in str(error), error  # noqa: PT017
                assert path.name in str(error) or "missing" in str(error)  # noqa: PT017
                named.add(field)
        path.write_text(content)
    assert len(named) >= 2


def damages(values):
    """(field, values with that field removed or of another kind) for every field of the first object of each list."""
    places = [()]
    while places:
        place = places.pop()
        here = at(values, place)
        keys = list(here)[:1] if isinstance(here, dict) and all(isinstance(v, dict) for v in here.values()) else here
        if isinstance(here, list):
            keys = range(min(1, len(here)))
        for key in keys if isinstance(here, dict | list) else ():
            places.append((*place, key))
            if not isinstance(key, str) or isinstance(at(values, (*place, key)), dict):
                continue
            for other in (None, 1.5, [], {}, "nothing", [None], [{}]):
                damaged = copy.deepcopy(values)
                if other is None:
                    del at(damaged, place)[key]
                else:
                    at(damaged, place)[key] = other
                yield key, damaged


def at(values, place):
    for key in place:
        values = values[key]
    return values


def test_a_table_with_a_line_too_short_is_described(tmp_path: Path):
    WRITERS["mmbench"](tmp_path)
    path = tmp_path / "mmbench_dev_20230712.tsv"
    content = path.read_text()
    path.write_text(content + "4\tWhat?\n")
    with pytest.raises(DataFolderError, match="row 4 is not one field for each of the columns"):
        load("mmbench", tmp_path)
    path.write_text(content.replace("1000001\t", "x\t"))
    with pytest.raises(DataFolderError, match="row 1 is not one field for each of the columns, with a number as index"):
        load("mmbench", tmp_path)
