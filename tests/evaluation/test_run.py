"""Runs: the same bytes however they are sharded, batched, or killed; results, submissions and pages at their end."""

import csv
import io
import json
import os
import random
import signal
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from dreamllm.cli import main
from dreamllm.documents import PictureError
from dreamllm.evaluation import drawing as drawing_module
from dreamllm.evaluation import run as run_module
from dreamllm.evaluation.answering import SEED
from dreamllm.evaluation.benchmarks import BENCHMARKS, find_benchmark
from dreamllm.evaluation.command import show_list
from dreamllm.evaluation.drawing import Networks, cropped_square
from dreamllm.evaluation.metrics import FeatureStatistics, feature_statistics, frechet_distance, kernel_distance
from dreamllm.evaluation.records import Shard
from dreamllm.evaluation.run import RunOptions, run_benchmark
from dreamllm.training import ConfigurationChangedError
from tests.evaluation.folders import COUNT, WRITERS, ScriptedAnswerer, picture, write_pictures


@pytest.fixture
def model(tmp_path):
    """A folder that passes for a model where the answers are scripted."""
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def run(tmp_path, model):
    """run(name, answer, **options): the results and the folder of a scripted run."""

    def start(name, answer=None, out="out", processes=1, **options):
        data = tmp_path / f"data-{name}"
        if not data.is_dir():
            data.mkdir()
            WRITERS[name](data)
        scripted = answer if isinstance(answer, ScriptedAnswerer) else ScriptedAnswerer(*filter(None, [answer]))
        settings = RunOptions(model, data, tmp_path / out, **{"batch_size": 2} | options)
        results = run_benchmark(find_benchmark(name), settings, processes, answerer=lambda _: scripted)
        return results, tmp_path / out

    return start


def records_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", WRITERS)
def test_every_benchmark_of_questions_runs_to_its_report(name, run):
    for protocol in ("original", "plain"):
        results, out = run(name, out=protocol, protocol=protocol)
        records = records_of(out)
        assert len(records) == results["samples"]
        assert [record["index"] for record in records] == list(range(len(records)))
        assert "dog 1" in {record["answer"] for record in records}
        assert (out / "report.html").is_file()
        assert results["paper"] == find_benchmark(name).paper
        submission = find_benchmark(name).submission
        assert submission is None or (out / submission[0]).is_file()


def test_limits_and_seeds(run):
    scripted = ScriptedAnswerer()
    results, _ = run("pope-random", scripted, limit=3)
    assert results["samples"] == 3
    assert [seed for *_, seed in scripted.asked] == [SEED, SEED + 1, SEED + 2]


def test_records_depend_neither_on_batches_nor_on_shards(run, tmp_path):
    _, whole = run("textvqa", out="whole")
    for batch_size in (1, 3, 100):
        _, other = run("textvqa", out=f"batch-{batch_size}", batch_size=batch_size)
        assert (other / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    for index in (2, 0, 1):
        results, other = run("textvqa", out="shards", shard=Shard(index, 3))
        assert (results is None) == (index != 1)
    assert (other / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    def slow(number, text):
        time.sleep(0.004)
        return f"answer {number} \u2028 é"

    monkeypatch.setitem(WRITERS, "docvqa", many_documents)
    _, whole = run("docvqa", slow, out="whole")
    rng = random.Random(0)
    for attempt in range(20):
        child = os.fork()
        if child == 0:
            try:
                run("docvqa", slow, out="killed")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = tmp_path / "killed" / "answers-00000-of-00001.jsonl"
        if attempt % 3 == 0 and path.is_file():  # and a line torn by a power cut
            with open(path, "r+b") as file:
                file.truncate(max(0, path.stat().st_size - rng.randint(0, 30)))
    run("docvqa", slow, out="killed")
    for name in ("answers-00000-of-00001.jsonl", "records.jsonl", "results.json", "docvqa_submission.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()


def many_documents(folder: Path) -> None:
    write_pictures(folder / "documents", ["p.png"])
    rows = [
        {"questionId": i, "image": "p.png", "question": f"What is {i}?", "answers": [f"dog {i}"]} for i in range(100)
    ]
    (folder / "val_v1.0.json").write_text(json.dumps({"data": rows}))


def test_a_complete_run_asks_nothing_again(run):
    first, out = run("textvqa")
    before = (out / "records.jsonl").read_bytes()

    def never(number, text):
        raise AssertionError("asked again")

    assert run("textvqa", never)[0] == first
    assert (out / "records.jsonl").read_bytes() == before


def test_another_run_in_the_folder_is_refused(run):
    run("textvqa")
    with pytest.raises(ConfigurationChangedError, match="protocol"):
        run("textvqa", protocol="plain")
    with pytest.raises(ConfigurationChangedError, match="samples"):
        run("textvqa", limit=2)


def test_answers_of_other_samples_are_refused(run, tmp_path):
    _, out = run("textvqa")
    path = out / "answers-00000-of-00001.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match="holds sample 1 where 0 belongs; remove the file"):
        run("textvqa")


def test_vizwiz_first_asks_whether_the_answer_can_be_known(run):
    def answer(number, text):
        if text.endswith("Is the answer can be known? ASSISTANT:"):
            assert "Based on the image" not in text
            return "I do NOT know" if number % 2 else "yes"
        return "Dog, brown."

    _, out = run("vizwiz-val", answer)
    records = records_of(out)
    assert [record["prediction"] for record in records] == ["dog", "unanswerable", "dog", "unanswerable", "dog"]
    assert records[1]["probe"] == "I do NOT know"


def test_mmbench_appends_the_options_when_the_answer_cannot_be_known(run):
    seen = []

    def answer(number, text):
        if "Is the answer can be known?" in text:
            return "No, it cannot" if number == 2 else "Yes, no doubt"
        seen.append(text)
        return "one"

    run("mmbench", answer, limit=3)
    assert [" Options: (0). one (1). twoPlease provide" in text for text in seen] == [False, False, True]


def test_submissions_are_as_the_servers_take_them(run):
    _, out = run("vqav2", lambda number, text: f"Dog {number}.")
    submitted = json.loads((out / "vqav2_submission.json").read_text())
    assert submitted[:2] == [
        {"question_id": 262148000, "answer": "dog 0"},
        {"question_id": 262149000, "answer": "dog 1"},
    ]
    assert len(submitted) == COUNT
    _, out = run("vizwiz", lambda number, text: "yes", out="vizwiz")
    assert json.loads((out / "vizwiz_submission.json").read_text())[0] == {
        "image": "VizWiz_test_00000000.jpg",
        "answer": "yes",
    }
    _, out = run("mm-vet", lambda number, text: f"Dog\n{number}", out="mm-vet")
    assert json.loads((out / "mm-vet_submission.json").read_text())["v1_2"] == "Dog\n2"
    _, out = run("docvqa", lambda number, text: f"Dog {number}.", out="docvqa")
    assert json.loads((out / "docvqa_submission.json").read_text())[1] == {"questionId": 49154, "answer": "Dog 1."}
    _, out = run("infographicvqa", lambda number, text: "é", out="infographicvqa")
    assert json.loads((out / "infographicvqa_submission.json").read_text())[0] == {"questionId": 98313, "answer": "é"}


def test_mmbench_submissions_have_the_columns_that_the_server_asks_for(run):
    """A .tsv with index, question, A to D and prediction; the kind of data is told by l2-category."""
    _, out = run("mmbench", lambda number, text: "a\tb\nc")
    with open(out / "mmbench_submission.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["index"] for row in rows] == ["1", "1000001", "2", "3"]
    first = {"A": "cat", "B": "dog", "C": "bird", "D": "", "answer": "B", "category": "nature"}
    first |= {"index": "1", "question": "Which?", "hint": "Look closely", "l2-category": "a group", "split": "dev"}
    assert rows[0] == first | {"prediction": "a b c"}
    assert (rows[2]["C"], rows[3]["question"]) == ("", 'Says "hi", or not?')


def test_a_judge_belongs_to_mm_vet(run, tmp_path, monkeypatch):
    (tmp_path / "a_judge.py").write_text("def grade(question, answers, prediction):\n    return 'dog' in answers\n")
    monkeypatch.syspath_prepend(tmp_path)
    results, out = run("mm-vet", judge="a_judge:grade")
    assert results["figures"][0] == {"name": "score", "value": 100.0}
    assert records_of(out)[0]["score"] == 1.0
    with pytest.raises(ValueError, match="TextVQA is not graded by a judge"):
        run("textvqa", judge="math:hypot")


def test_a_corrupt_picture_is_named_and_what_was_answered_stays(run, tmp_path):
    (tmp_path / "data-textvqa").mkdir()
    WRITERS["textvqa"](tmp_path / "data-textvqa")
    broken = tmp_path / "data-textvqa" / "train_images" / "303f89b4f05e5ab1.jpg"
    good = broken.read_bytes()
    broken.write_bytes(b"nothing")
    with pytest.raises(PictureError, match="of sample 34605 "):
        run("textvqa")
    assert len((tmp_path / "out" / "answers-00000-of-00001.jsonl").read_text().splitlines()) == 2
    broken.write_bytes(good)
    assert run("textvqa")[0]["samples"] == COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "limit must be at least 1"), ({"batch_size": 0}, "batch_size must be at least 1")],
)
def test_options_out_of_range_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run("textvqa", **options)


def test_shards_are_named():
    assert Shard.parse("2/8") == Shard(2, 8)
    with pytest.raises(ValueError, match="written INDEX/COUNT, for example 0/4, not 'two'"):
        Shard.parse("two")
    with pytest.raises(ValueError, match="shard 8 of 8 does not exist; shards are 0 to 7"):
        Shard.parse("8/8")


def test_processes_and_shards_exclude_each_other(run):
    with pytest.raises(ValueError, match="processes or a shard, not both"):
        run("textvqa", processes=2, shard=Shard(0, 2))


# -- the page ----------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.sources, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.sources += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_failures_first_and_the_papers_rows(run):
    _, out = run("textvqa", lambda number, text: "cow <3>" if number == 3 else f"dog {number}")
    page = (out / "report.html").read_text(encoding="utf-8")
    seen = Seen(page)
    text = " ".join(" ".join(seen.text).split())
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert len(seen.sources) == COUNT
    assert "a-model, 5 samples of validation, by the original protocol. The paper reports 34.9." in text
    assert "request Please provide an accurate answer within one word." in text
    assert "decoding, beams 5" in text
    assert "DreamLLM-7B 115.4" in text
    assert text.index("What is 3?") < text.index("What is 0?")
    assert "cow &lt;3&gt;" in page
    assert "expected: dog 3; cat" in text
    ours = page[page.index('class="ours"') :]
    assert ours.index("80.00") < ours.index("</tr>")


def test_figures_of_runs_beside_it_stand_in_our_row(run):
    run("okvqa", out="okvqa")
    _, out = run("textvqa", out="textvqa")
    ours = (out / "report.html").read_text().partition('class="ours"')[2].partition("</tr>")[0]
    assert ours.count("100.00") == 2
    assert ours.count("<td") == 8


def test_a_limited_run_says_so_in_our_row(run):
    _, out = run("textvqa", limit=3)
    page = (out / "report.html").read_text()
    assert "100.00 (3)" in page.partition('class="ours"')[2].partition("</tr>")[0]
    assert "In brackets: the number of samples" in page


def test_a_score_that_was_not_run_is_never_a_number(run):
    results, out = run("vqav2")
    assert results["figures"] == [
        {
            "name": "VQA accuracy",
            "value": None,
            "reason": "the answers are on the server; the submission file is written",
        }
    ]
    assert "not run: the answers are on the server" in (out / "report.html").read_text()


# -- creation ----------------------------------------------------------------------------------------------------------


class Agreement:
    """Stands for CLIP: agrees best with the candidate of the largest red value."""

    def agreement(self, pictures, texts):
        return torch.tensor([[p.getpixel((0, 0))[0] / 255 - t / 1000 for t in range(len(texts))] for p in pictures])


def small_features(pixels):
    return torch.cat([pixels.mean((2, 3)), pixels[:, :, 0, 0] ** 2], 1)


@pytest.fixture
def coco(tmp_path, model, monkeypatch):
    data = tmp_path / "coco"
    data.mkdir()
    rows = [{"image_id": i, "caption": f"caption {i} {k}"} for i in range(6) for k in range(3)]
    (data / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    reference = feature_statistics(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    networks = Networks(small_features, Agreement(), reference)
    monkeypatch.setattr(run_module, "load_networks", lambda *_: networks)
    return RunOptions(model, data, tmp_path / "out", batch_size=4), reference


def test_the_best_of_eight_candidates_is_kept(coco):
    options, reference = coco
    benchmark = find_benchmark("coco-fid")
    results = run_benchmark(benchmark, options, answerer=lambda _: ScriptedAnswerer())
    records = records_of(options.out)
    kept = []
    for record in records:
        candidates = [(7 * record["seed"] + c) % 256 for c in range(8)]
        assert record["candidate"] == candidates.index(max(candidates))
        image = Image.open(options.out / "pictures" / f"{record['index']:06d}.png")
        assert image.getpixel((0, 0))[0] == max(candidates)
        kept.append(cropped_square(image.convert("RGB"), 256))
    pixels = drawing_module.inception_pixels(kept, "bilinear")
    expected = frechet_distance(feature_statistics(small_features(pixels)), reference)
    assert results["figures"][0] == {"name": "FID", "value": pytest.approx(expected)}
    assert results["resize"] == "bilinear"
    assert FeatureStatistics.load(options.out / "statistics.npz").count == 6
    assert (options.out / "report.html").is_file()


def test_creation_resumes_and_shards_to_the_same_records(coco, tmp_path):
    options, _ = coco
    benchmark = find_benchmark("coco-fid")
    run_benchmark(benchmark, options, answerer=lambda _: ScriptedAnswerer())
    for index in (1, 0):
        part = replace(options, out=tmp_path / "parts", shard=Shard(index, 2), batch_size=2)
        run_benchmark(benchmark, part, answerer=lambda _: ScriptedAnswerer())
    assert (tmp_path / "parts" / "records.jsonl").read_bytes() == (options.out / "records.jsonl").read_bytes()


def test_documents_are_compared_with_their_own_pictures(tmp_path, model, monkeypatch):
    data = tmp_path / "documents"
    write_pictures(data / "images", [f"{i}.png" for i in range(4)])
    lines = [
        {"text_list": [f"text {i}"], "image_info": [{"image_name": f"{i}.png", "matched_text_index": 0}]}
        for i in range(4)
    ]
    (data / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(run_module, "load_networks", lambda *_: Networks(small_features, None, None))

    class Copies(ScriptedAnswerer):
        def pictures(self, prompts, drawing, seeds):
            return [[picture(int(prompt.text().split()[1]))] for prompt in prompts]

    options = RunOptions(model, data, tmp_path / "out", batch_size=3)
    results = run_benchmark(find_benchmark("interleaved-fid"), options, answerer=lambda _: Copies())
    fid, kid = results["figures"]
    assert fid == {"name": "FID", "value": pytest.approx(0, abs=1e-9)}
    features = small_features(
        drawing_module.inception_pixels([cropped_square(picture(i), 256) for i in range(4)], "bilinear")
    )
    expected = 1000 * kernel_distance(features, features, subset_size=4).mean
    assert kid == {"name": "KID x 1000, subsets of 4", "value": pytest.approx(expected)}


def test_short_sides_are_resized_and_centres_cropped():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 0, 0), (10, 0, 30, 20))
    cropped = cropped_square(wide, 10)
    assert cropped.size == (10, 10)
    assert cropped.getpixel((5, 5)) == (255, 0, 0)


# -- the command -------------------------------------------------------------------------------------------------------


def failure(capsys, *arguments):
    with pytest.raises(SystemExit):
        main(["evaluate", *map(str, arguments)])
    return capsys.readouterr().err


def test_the_list_names_every_benchmark_with_its_files(capsys):
    main(["evaluate", "--list"])
    shown = capsys.readouterr().out
    for benchmark in BENCHMARKS.values():
        assert benchmark.name in shown
        assert benchmark.paper.split()[0] in shown if benchmark.paper else True
    assert "v2_OpenEnded_mscoco_test-dev2015_questions.json" in shown


@pytest.mark.parametrize("width", [80, 160])
def test_no_name_of_a_file_is_broken_in_the_list(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show_list(console)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    for benchmark in BENCHMARKS.values():
        for name in " or ".join(benchmark.files).replace(", or ", " or ").replace(" and ", " or ").split(" or "):
            assert any(name in line for line in lines), name


def test_the_command_says_what_is_missing(capsys, tmp_path, model):
    assert "name a benchmark; --list shows them" in failure(capsys)
    assert "unknown benchmark 'nothing'" in failure(capsys, "nothing")
    assert "TextVQA needs --model and --data; the data folder holds: TextVQA" in failure(capsys, "textvqa")
    assert "does not exist" in failure(capsys, "textvqa", "--model", tmp_path / "no", "--data", tmp_path)
    message = failure(capsys, "textvqa", "--model", model, "--data", tmp_path, "--out", tmp_path / "out")
    assert "has no file TextVQA_0.5.1_val.json; it holds a-model/" in message
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_figures(capsys, tmp_path, model, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    WRITERS["textvqa"](data)
    monkeypatch.setattr(run_module.run_benchmark, "__defaults__", (1, None, lambda _: ScriptedAnswerer()))
    main(["evaluate", "textvqa", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "VQA accuracy" in printed.out
    assert "100.00" in printed.out
    assert "5 samples of TextVQA, validation; the paper reports 34.9" in printed.out
    assert printed.err == ""


def test_nothing_is_said_where_there_is_no_terminal(run, tmp_path, model):
    data = tmp_path / "data"
    data.mkdir()
    WRITERS["textvqa"](data)
    with open(tmp_path / "said", "w") as file:
        options = RunOptions(model, data, tmp_path / "quiet")
        run_benchmark(find_benchmark("textvqa"), options, 1, Console(file=file), lambda _: ScriptedAnswerer())
    assert (tmp_path / "said").read_text() == ""
