"""A run of the digits recipe as one page: losses, results, digits, captions, documents, attention."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamllm.evaluation.charts import CHART_STYLE, interval_chart, line_chart
from dreamllm.evaluation.digits import RESULTS_FILE, SAMPLES_FILE, WORDS, names_only
from dreamllm.evaluation.samples import DigitsSamples
from dreamllm.inference.page import data_uri, escape, flow, report_page
from dreamllm.training import write_text

METRICS_FILE, REPORT_FILE, EVALUATION_FOLDER = "metrics.jsonl", "report.html", "evaluation"
LOSSES = {"lm_loss": "Language loss", "vm_loss": "Picture loss", "loss": "Loss"}
RESULT_NAMES = {
    "captions": ("Captions", "real scans it has never seen, named rightly"),
    "creation": ("Creation", "drawn digits that the judge reads as what was asked"),
    "counting": ("Counting", "documents continued with the right word, a picture by its own decision, the right digit"),
    "counting_word": ("the right word", ""),
    "counting_dreamed": ("a picture by its own decision", ""),
    "counting_drawn": ("the right digit in it", ""),
    "judge": ("The judge", "real scans that the judge itself reads rightly; it was trained on scans only"),
}
SHOWN_CAPTIONS, SHOWN_CREATED, SHOWN_REAL, SHOWN_MAPS, MAPS_PER_ROW = 60, 10, 4, 64, 8

STYLE = """
main { max-width: 60rem; }
.verdict { white-space: nowrap; } .good { color: var(--good); } .bad { color: var(--bad); }
.px { display: block; border-radius: 3px; }

.results { display: grid; gap: 1.1rem; margin: 1.5rem 0 0; }
.result { display: grid; grid-template-columns: 15rem 1fr 7.5rem; gap: 0.2rem 1.5rem; align-items: center; }
.result .figure { font: 600 1.5rem/1 var(--label); font-variant-numeric: tabular-nums; text-align: right; }
.result.part { margin-left: 1.2rem; grid-template-columns: 13.8rem 1fr 7.5rem; }
.result.part h3 { font-weight: 400; }
.result.part .figure { font-weight: 400; font-size: 1rem; }
.result .label { grid-column: 1 / -1; }

.digits { display: grid; gap: 0.45rem; overflow-x: auto; padding-bottom: 0.3rem; }
.digits > div {
  display: grid; grid-template-columns: 3.4rem max-content max-content; gap: 0.45rem 1.6rem; align-items: center;
}
.set { display: flex; gap: 0.4rem; }
.set .px { width: 40px; height: 40px; }
.wrong { outline: 2px solid var(--bad); outline-offset: 1px; }

.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: 1.1rem 0.8rem; }
.captions figure { margin: 0; text-align: center; }
.captions .px { width: 56px; height: 56px; margin: 0 auto 0.35rem; }
.captions figcaption { font: 0.82rem/1.3 var(--label); overflow-wrap: anywhere; }

.documents { display: grid; gap: 1rem; }
.document {
  background: var(--raised); border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem 1.3rem;
}
.document .prompt { margin-bottom: 1rem; }
.document img.tiny { width: 72px; height: 72px; }

.attention {
  display: grid; gap: 0.5rem 2rem; overflow-x: auto; padding-bottom: 0.3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(calc(9rem + 4rem * var(--columns)), 100%), 1fr));
}
.attention > div { display: flex; gap: 0.45rem; align-items: center; }
.attention .label { width: 3rem; flex: none; }
.attention .px { width: 56px; height: 56px; }
.attention > div > .px { margin-right: 0.5rem; flex: none; }
.attention .maps { display: grid; grid-template-columns: repeat(var(--columns), max-content); gap: 0.45rem; }
@media (max-width: 40rem) {
  .result, .result.part { grid-template-columns: 1fr auto; }
  .result .scale { grid-column: 1 / -1; grid-row: 2; }
  .digits > div { grid-template-columns: 2.6rem 1fr; gap: 2px 0.4rem; margin-bottom: 0.5rem; }
  .set { grid-column: 2; gap: 2px; } .set .px { width: 24px; height: 24px; }
  .attention .px { width: 40px; height: 40px; }
}
"""

# Dark to bright with evenly rising lightness, so that a map reads the same in grey.
_HEAT = np.array([(13, 8, 40), (66, 15, 106), (140, 35, 105), (210, 68, 70), (245, 135, 40), (252, 225, 120)], float)


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run's folder from its `metrics.jsonl` and `evaluation/`; returns the page's path.

    Raises `FileNotFoundError` naming what the run lacks, and `ValueError` for metrics that cannot be read.
    """
    run_dir = Path(run_dir)
    needed = [run_dir / METRICS_FILE, *(run_dir / EVALUATION_FOLDER / name for name in (RESULTS_FILE, SAMPLES_FILE))]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"the run is not complete; missing: {', '.join(missing)}")
    metrics = _read_metrics(needed[0])
    results = json.loads(needed[1].read_text(encoding="utf-8"))
    samples = DigitsSamples.load(needed[2])
    sections = (
        _introduction(results),
        _results(results),
        _losses(metrics),
        _created(samples),
        _captions(samples),
        _documents(samples),
        _attention(samples),
    )
    page = report_page("A small DreamLLM", "".join([*sections, _footer(run_dir)]), CHART_STYLE + STYLE)
    path = run_dir / REPORT_FILE
    write_text(path, page)
    return path


def _introduction(results: dict[str, Any]) -> str:
    names = [name for name, value in results.items() if isinstance(value, dict) and "target" in value]
    reached = sum(results[name]["reached"] for name in names)
    return (
        "<h1>A small DreamLLM on scanned digits</h1>"
        '<p class="lead">One model that reads pictures, draws them, and decides itself where in a text they go. '
        f"On digits it has never seen it reaches {reached} of {len(names)} targets.</p>"
    )


def _results(results: dict[str, Any]) -> str:
    rows = []
    for name, (title, explanation) in RESULT_NAMES.items():
        value = results[name]
        target = value.get("target")
        verdict = ""
        if target is not None:
            word, style = ("reached", "good") if value["reached"] else ("missed", "bad")
            verdict = f' · <span class="verdict {style}">target {target:.0%} {word}</span>'
        low, high = value["interval_95"]
        detail = f"{value['right']} of {value['total']}, 95% interval {low:.1%} to {high:.1%}{verdict}"
        detail = f"{explanation}: {detail}" if explanation else detail
        rows.append(
            f'<div class="result{" part" if "_" in name else ""}"><h3>{title}</h3>'
            f"{interval_chart(value['share'], (low, high), target)}"
            f'<div class="figure">{value["share"]:.1%}</div><div class="label">{detail}</div></div>'
        )
    note = "Bars from 0 to 100%; the line on a bar is the 95% interval, the dotted mark the target."
    return f'<h2>Results on unseen data</h2><p class="note">{note}</p><div class="results">{"".join(rows)}</div>'


def _losses(metrics: Sequence[dict[str, Any]]) -> str:
    figures = []
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        kinds = [kind for kind in ("lm_loss", "vm_loss") if any(_has(row, kind) for row in rows)] or ["loss"]
        for kind in kinds:
            points = [(row["step"], row[kind]) for row in rows if _has(row, kind)]
            if points:
                steps, values = zip(*points, strict=True)
                chart = line_chart(steps, values, f"{stage}, {LOSSES[kind].lower()}")
                caption = f'<h3>{escape(str(stage))}</h3><span class="label">{LOSSES[kind]}</span>'
                figures.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>")
    note = (
        "Loss over training steps, stage by stage. Faint: as recorded; strong: moving average; "
        "the number: mean of the last twentieth."
    )
    return f'<h2>Training</h2><p class="note">{note}</p><div class="charts">{"".join(figures)}</div>'


def _created(samples: DigitsSamples) -> str:
    rows = []
    for number, word in enumerate(WORDS):
        real = samples.pictures[samples.labels == number][:SHOWN_REAL]
        chosen = np.flatnonzero(samples.wanted == number)[:SHOWN_CREATED]
        drawn = "".join(
            _ink(samples.created[i], f"drawn {word}, read as {WORDS[samples.judged[i]]}", samples.judged[i] != number)
            for i in chosen
        )
        scans = "".join(_ink(picture, f"real {word}") for picture in real)
        rows.append(
            f'<div><span class="label">{word}</span><div class="set">{scans}</div><div class="set">{drawn}</div></div>'
        )
    wrong = int(np.sum(samples.judged != samples.wanted))
    note = (
        f"Of each number {SHOWN_REAL} real scans it has never seen, then the first {SHOWN_CREATED} it drew, "
        f"not a selection. Framed: the judge reads another digit ({wrong} of all {len(samples.wanted)} drawn)."
    )
    return f'<h2>Created digits</h2><p class="note">{note}</p><div class="digits">{"".join(rows)}</div>'


def _captions(samples: DigitsSamples) -> str:
    right = [names_only(text, label) for text, label in zip(samples.captions, samples.labels, strict=True)]
    wrong = [i for i, good in enumerate(right) if not good]
    first = range(min(SHOWN_CAPTIONS, len(right)))
    later = [i for i in wrong if i not in first][:SHOWN_CAPTIONS]

    def grid(indices: Iterable[int]) -> str:
        figures = []
        for i in indices:
            word = WORDS[samples.labels[i]]
            mark = "" if right[i] else f'<br><span class="bad">is {word}</span>'
            caption = escape(samples.captions[i]) or "(nothing)"
            figures.append(
                f"<figure>{_ink(samples.pictures[i], word, not right[i])}"
                f"<figcaption>{caption}{mark}</figcaption></figure>"
            )
        return f'<div class="captions">{"".join(figures)}</div>'

    note = f"The first {len(first)} unseen scans and what it wrote about them. Wrong ones are framed."
    more = f'<p class="note" style="margin-top:2rem">The other wrong ones.</p>{grid(later)}' if later else ""
    return f'<h2>Captions</h2><p class="note">{note}</p>{grid(first)}{more}'


def _documents(samples: DigitsSamples) -> str:
    articles = [
        f'<article class="document"><div class="prompt"><p>{escape(asked)}</p></div>'
        f'<div class="flow">{flow(document)}</div></article>'
        for asked, document in zip(samples.instructions, samples.documents, strict=True)
    ]
    note = "Whole answers. Where a picture stands, and that there is one, was the model's own decision."
    return f'<h2>Documents</h2><p class="note">{note}</p><div class="documents">{"".join(articles)}</div>'


def _attention(samples: DigitsSamples) -> str:
    queries = samples.attention_maps.shape[1]
    shown = min(queries, SHOWN_MAPS)
    rows = []
    for number, (picture, maps) in enumerate(zip(samples.attention_pictures, samples.attention_maps, strict=True)):
        low, high = float(maps.min()), float(maps.max())
        heat = "".join(
            f'<img class="px" src="{data_uri(heat_map(m, low, high))}" alt="query {q + 1}" '
            f'title="query {q + 1}: {m.min():.1%} to {m.max():.1%}">'
            for q, m in enumerate(maps[:shown])
        )
        rows.append(
            f'<div><span class="label">{WORDS[number]}</span>{_ink(picture, f"drawn {WORDS[number]}")}'
            f'<div class="maps">{heat}</div></div>'
        )
    note = (
        f"Where each of the {queries} dream queries acted while the digit on the left was drawn: the UNet's "
        f"cross-attention, mean over heads, layers and steps. Bright: this query got more of the place's attention; "
        f"one scale per row; an even share would be {1 / queries:.1%}."
    )
    return (
        f'<h2>Attention of the dream queries</h2><p class="note">{note}</p>'
        f'<div class="attention" style="--columns: {min(shown, MAPS_PER_ROW)}">{"".join(rows)}</div>'
    )


def _footer(run_dir: Path) -> str:
    return (
        f'<footer class="label">Made from {METRICS_FILE} and {EVALUATION_FOLDER}/ of the run '
        f"“{escape(run_dir.resolve().name)}”. Scans: Optical Recognition of Handwritten Digits (Alpaydin and Kaynak; "
        "UCI), 8 by 8 pixels.</footer>"
    )


def heat_map(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Values [h, w] -> an RGB picture, dark at `low`, bright at `high`."""
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_HEAT) - 1)
    index = np.minimum(scaled.astype(int), len(_HEAT) - 2)
    part = (scaled - index)[..., None]
    return Image.fromarray((_HEAT[index] * (1 - part) + _HEAT[index + 1] * part).round().astype(np.uint8))


def _ink(picture: np.ndarray, alt: str, wrong: bool = False) -> str:
    style = "px wrong" if wrong else "px"
    return f'<img class="{style}" src="{data_uri(Image.fromarray(picture))}" alt="{escape(alt)}" title="{escape(alt)}">'


def _has(row: dict[str, Any], kind: str) -> bool:
    return row.get(kind) is not None and math.isfinite(row[kind])


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["stage"], row["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not a line of metrics with stage and step: {error}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
