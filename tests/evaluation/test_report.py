"""The report: complete, self-contained, and marking what is wrong."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamllm.documents import Document, End, Picture, Text
from dreamllm.evaluation import DigitsSamples, Proportion, write_report
from dreamllm.evaluation.digits import DigitsEvaluation, DigitsResults
from dreamllm.evaluation.report import heat_map


def samples():
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    labels = np.arange(80) % 10
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    captions = [words[label] for label in labels]
    captions[3], captions[75] = "<eight>", "nothing"
    wanted = np.repeat(np.arange(10), 5)
    judged = wanted.copy()
    judged[:4] = 9
    picture = Picture(Image.fromarray(noise(8, 8)), comprehension=True, creation=True)
    document = Document((Text("two"), picture, Text("three"), picture, End()))
    maps = rng.random((10, 4, 8, 8), dtype=np.float32)
    return DigitsSamples(
        noise(80, 8, 8), labels, captions, noise(50, 8, 8), wanted, judged,
        ["Count from two to three with pictures."], [document], noise(10, 8, 8), maps / maps.sum(1, keepdims=True),
    )  # fmt: skip


def results():
    good, bad = Proportion(78, 80), Proportion(50, 80)
    return DigitsResults(good, good, good, bad, bad, good, bad, 1.0)


def metrics_lines():
    rows = [{"stage": "I", "step": 10 * i, "lm_loss": None, "vm_loss": 1 / i, "loss": 10 / i} for i in range(1, 20)]
    rows += [{"stage": "II", "step": 10 * i, "lm_loss": 3 / i, "vm_loss": 0.2, "loss": 5.0} for i in range(1, 20)]
    return [json.dumps(row) for row in rows]


@pytest.fixture
def run_dir(tmp_path):
    DigitsEvaluation(results(), samples()).save(tmp_path / "evaluation")
    (tmp_path / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n")
    return tmp_path


class Balanced(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.sources, self.images = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [v for k, v in attributes.items() if k in ("src", "href")]
        if tag == "img":
            self.images.append(attributes)
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def parsed(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    seen = Balanced(page)
    return page, seen, " ".join(" ".join(seen.text).split())


def test_the_report_needs_nothing_else(run_dir):
    page, seen, _ = parsed(run_dir)
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert not re.search(r"url\(|@import|<script|<link|https?://", page)
    assert not list(run_dir.glob("*.partial"))


def test_results_stand_beside_their_targets(run_dir):
    _, _, text = parsed(run_dir)
    assert "it reaches 2 of 3 targets" in text
    assert "78 of 80, 95% interval 91.3% to 99.3% · target 93% reached" in text
    assert "target 80% missed" in text
    assert "62.5%" in text


def test_there_is_a_curve_for_every_loss_of_every_stage(run_dir):
    page, _, text = parsed(run_dir)
    assert page.count('<svg class="chart"') == 3
    assert "I, picture loss" in page
    assert "I, language loss" in page
    assert text.count("Language loss") == 1


def test_a_stage_with_one_loss_only_is_shown(run_dir):
    line = json.dumps({"stage": "vision", "step": 1, "loss": 0.5})
    (run_dir / "metrics.jsonl").write_text("\n".join([line, *metrics_lines()]))
    assert "vision, loss" in parsed(run_dir)[0]


def test_wrong_digits_and_captions_are_marked(run_dir):
    page, seen, text = parsed(run_dir)
    framed = [image["alt"] for image in seen.images if "wrong" in image.get("class", "")]
    assert framed == ["drawn zero, read as nine"] * 4 + ["three", "five"]
    assert "4 of all 50 drawn" in text
    assert "&lt;eight&gt;" in page
    assert "is three" in text
    assert "The other wrong ones." in text


def test_documents_stand_as_a_reader_sees_them(run_dir):
    _, _, text = parsed(run_dir)
    assert "Count from two to three with pictures. two three" in text


def test_every_query_has_a_map(run_dir):
    _, seen, text = parsed(run_dir)
    assert sum(image["alt"].startswith("query ") for image in seen.images) == 40
    assert "an even share would be 25.0%" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation/digits.json", "evaluation/digits.npz"])
def test_what_the_run_lacks_is_named(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"the run is not complete; missing: .*{Path(name).name}"):
        write_report(run_dir)


@pytest.mark.parametrize(("line", "number"), [("{", 1), ("{}", 1), ("[1]", 1)])
def test_broken_metrics_are_named_by_line(run_dir, line, number):
    (run_dir / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=f"line {number}, is not a line of metrics"):
        write_report(run_dir)


def test_empty_metrics_are_refused(run_dir):
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        write_report(run_dir)


def test_heat_maps_rise_in_lightness():
    row = np.asarray(heat_map(np.linspace(0, 1, 50)[None], 0, 1).convert("L"))[0].astype(int)
    assert (np.diff(row) >= 0).all()
    assert row[-1] - row[0] > 150
