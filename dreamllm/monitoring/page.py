"""A training run as one page: where it stands, its curves, its samples, its data's problems, its configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamllm.documents import PictureError, load_picture
from dreamllm.evaluation.charts import CHART_STYLE, line_chart
from dreamllm.inference.page import escape, picture_tag, report_page
from dreamllm.monitoring.samples import Sample, read_samples
from dreamllm.training import read_metrics, write_text

PAGE_FILE = "run.html"
SHOWN_TIMES = 6
"""Moments at which samples of one prompt are shown: the first, the last and evenly between."""

STYLE = """
td, th { font: 0.86rem/1.4 var(--label); }
th { color: var(--muted); }
table { border-collapse: collapse; min-width: 30rem; }
th, td { text-align: left; padding: 0.3rem 1.4rem 0.3rem 0; border-bottom: 1px solid var(--line); font-weight: 400; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td .done { display: inline-block; height: 0.55rem; border-radius: 3px; background: var(--line); width: 8rem; }
td .done i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.prompt-samples { border-top: 1px solid var(--line); padding: 1rem 0 0.4rem; }
.times { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem 1.2rem; }
.times figure { margin: 0; } .times img { max-width: 100%; height: auto; border-radius: 4px; }
.times figcaption { font: 0.86rem/1.4 var(--label); overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; font: 600 0.95rem/1.4 var(--label); }
pre { font-size: 0.82rem; line-height: 1.45; overflow-x: auto; background: var(--raised); border: 1px solid var(--line);
  border-radius: 8px; padding: 1rem; }
"""


@dataclass(frozen=True)
class Curve:
    """One chart per stage: `value` of a line of metrics, None where it does not apply."""

    title: str
    value: Callable[[dict[str, Any]], float | None]


def _rate(key: str) -> Callable[[dict[str, Any]], float | None]:
    def per_second(line: dict[str, Any]) -> float | None:
        return line[key] / line["seconds"] if line.get(key) and line["seconds"] > 0 else None

    return per_second


def _field(key: str, scale: float = 1.0) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: None if line.get(key) is None else scale * line[key]


CURVES = (
    Curve("Language loss", _field("lm_loss")),
    Curve("Diffusion loss", _field("vm_loss")),
    Curve("Gradient norm", _field("grad_norm")),
    Curve("Learning rate", _field("lr")),
    Curve("Tokens per second", _rate("tokens")),
    Curve("Pictures created per second", _rate("pictures")),
    Curve("Share of the devices' peak, %", _field("share_of_peak", 100.0)),
    Curve("Waiting for data, % of the time", lambda line: _share(line, "data_seconds")),
    Curve("Peak memory, GiB", _field("memory_bytes", 2.0**-30)),
)


def _share(line: dict[str, Any], key: str) -> float | None:
    return 100 * line[key] / line["seconds"] if line.get(key) is not None and line["seconds"] > 0 else None


def write_run_page(run: str | Path) -> Path:
    """Writes `run.html` into a run's folder, finished or not, and returns its path.

    Raises `FileNotFoundError` for a folder that is not one of a run, and `ValueError` for a run without metrics yet.
    """
    run = Path(run)
    configuration = run / "run.json"
    if not configuration.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no run.json")
    values = json.loads(configuration.read_text(encoding="utf-8"))["configuration"]
    metrics = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    if not metrics:
        raise ValueError(f"{run} has no metrics yet: no interval of settings.log_every steps is complete")
    name = run.resolve().name
    sections = (
        f"<h1>{escape(name)}</h1>{_introduction(values, metrics)}",
        _stages(run, values["stages"], metrics),
        *(_charts(stage["name"], metrics) for stage in values["stages"]),
        _samples(run, read_samples(run)),
        _problems(run, values["stages"]),
        _configuration(values),
    )
    footer = (
        f'<footer class="label">Made from run.json, metrics.jsonl and samples of the run “{escape(name)}”.</footer>'
    )
    page = report_page(f"Run {name}", "".join([*sections, footer]), CHART_STYLE + STYLE)
    path = run / PAGE_FILE
    write_text(path, page)
    return path


def _introduction(values: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    seconds = sum(line["seconds"] for line in metrics)
    documents, tokens = (sum(line[key] for line in metrics) for key in ("documents", "tokens"))
    pictures = sum(line["pictures"] for line in metrics)
    drawn = f", {pictures:,} pictures to create" if pictures else ""
    return (
        f'<p class="note">From “{escape(str(values["model"]))}”, seed {values["seed"]}. So far {documents:,} '
        f"documents, {tokens:,} tokens{drawn} in {_duration(seconds)} of training.</p>"
    )


def _stages(run: Path, stages: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        lines = [line for line in metrics if line["stage"] == stage["name"]]
        step = lines[-1]["step"] if lines else 0
        complete = (run / stage["name"] / "done.json").is_file()
        state = "complete" if complete else "begun" if lines else "not begun"
        seconds = sum(line["seconds"] for line in lines)
        left = "" if complete or not step else _duration(seconds / step * (stage["steps"] - step))
        losses = [_last(lines, "lm_loss"), _last(lines, "vm_loss")]
        rows.append(
            f"<tr><td>{escape(stage['name'])}</td><td>{state}</td>"
            f'<td><span class="done"><i style="width:{step / stage["steps"]:.1%}"></i></span></td>'
            f'<td class="n">{step:,} of {stage["steps"]:,}</td><td class="n">{_duration(seconds) if lines else ""}</td>'
            f'<td class="n">{left}</td>' + "".join(f'<td class="n">{loss}</td>' for loss in losses) + "</tr>"
        )
    head = (
        "<tr><th>stage</th><th></th><th></th><th class=n>steps</th><th class=n>took</th><th class=n>left</th>"
        "<th class=n>language loss</th><th class=n>diffusion loss</th></tr>"
    )
    note = (
        "Below, each stage's curves over its steps. Faint: as recorded; strong: moving average; the number: mean of "
        "the last twentieth. All axes begin at zero."
    )
    table = f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    return f'<h2>Stages</h2>{table}<p class="note" style="margin-top: 1.2rem">{note}</p>'


def _last(lines: Sequence[dict[str, Any]], key: str) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{values[-1]:.4g}" if values else ""


def _charts(stage: str, metrics: Sequence[dict[str, Any]]) -> str:
    lines = [line for line in metrics if line["stage"] == stage]
    figures = []
    for curve in CURVES:
        points = [(line["step"], value) for line in lines if (value := curve.value(line)) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            chart = line_chart(steps, values, f"{stage}, {curve.title.lower()}")
            figures.append(f"<figure><figcaption><h3>{curve.title}</h3></figcaption>{chart}</figure>")
    if not figures:
        return ""
    return f'<h2>{escape(stage)}</h2><div class="charts">{"".join(figures)}</div>'


def _samples(run: Path, samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    blocks = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        chosen = _spread([sample for sample in samples if sample.prompt == prompt])
        figures = "".join(_sample(run, sample) for sample in chosen)
        blocks.append(f'<div class="prompt-samples"><h3>{escape(prompt)}</h3><div class="times">{figures}</div></div>')
    note = "What the model made of the same prompts as it learned, with the same noise each time."
    return f'<h2>Samples</h2><p class="note">{note}</p>{"".join(blocks)}'


def _sample(run: Path, sample: Sample) -> str:
    pictures = [_picture(run, name, sample.step) for name in sample.pictures]
    when = f'<span class="label">{escape(sample.stage)}, step {sample.step:,}</span>'
    text = f"<br>{escape(sample.text)}" if sample.text else ""
    return f"<figure>{''.join(pictures)}<figcaption>{when}{text}</figcaption></figure>"


def _picture(run: Path, name: str, step: int) -> str:
    try:
        return picture_tag(load_picture(run / name), f"after step {step}")
    except PictureError:
        return f'<span class="label">{escape(name)} cannot be read</span>'


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    count = min(SHOWN_TIMES, len(samples))
    if count < 2:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (count - 1))] for i in range(count)]


def _problems(run: Path, stages: Sequence[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        done = run / stage["name"] / "done.json"
        data = json.loads(done.read_text(encoding="utf-8"))["data"] if done.is_file() else {"counts": {}}
        for reason, count in sorted(data["counts"].items(), key=lambda item: -item[1]):
            example = next(iter(data["examples"].get(reason, [])), "")
            rows.append(
                f"<tr><td>{escape(stage['name'])}</td><td>{escape(reason)}</td>"
                f'<td class="n">{count:,}</td><td>{escape(example)}</td></tr>'
            )
    if not rows:
        return ""
    head = "<tr><th>stage</th><th>reason</th><th class=n>samples</th><th>for example</th></tr>"
    return f'<h2>Data that was left out or changed</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _configuration(values: dict[str, Any]) -> str:
    text = escape(json.dumps(values, indent=2, ensure_ascii=False))
    return f"<h2>Configuration</h2><details><summary>as resolved</summary><pre>{text}</pre></details>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
