"""A survey as one HTML page that needs nothing else: its figures, and documents as the model sees them."""

from __future__ import annotations

import base64
import io

from PIL import Image

from dreamllm.inference.page import escape, html_page
from dreamllm.inspection.figures import figures, problem_rows
from dreamllm.inspection.segments import Segment
from dreamllm.inspection.survey import Shown, Survey

THUMBNAIL = 168
"""Longest side of a thumbnail in pixels; shown at half of that on dense screens."""

STYLE = """
:root { --learned: #1d6b45; --learned-bg: #e3f2e9; --dream: #8a4baf; --image: #2f5fb3; }
@media (prefers-color-scheme: dark) {
  :root { --learned: #8fd6ae; --learned-bg: #1b3427; --dream: #c79be6; --image: #8db4f5; }
}
body { font: 1rem/1.6 var(--label); padding-inline: clamp(0.9rem, 4vw, 2rem); }
main { max-width: 58rem; }
h1 { margin-bottom: 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0.8rem; }
.note { color: var(--muted); margin: 0 0 1.2rem; max-width: 46rem; }
.figures { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.figures th, .figures td { padding: 0.32rem 0.9rem 0.32rem 0; text-align: left; vertical-align: top; }
.figures tr + tr > * { border-top: 1px solid var(--line); }
.figures th { font-weight: 400; color: var(--muted); width: 13rem; }
.figures td { overflow-wrap: anywhere; }
@media (max-width: 36rem) {
  .figures tr { display: flex; flex-wrap: wrap; }
  .figures tr + tr { border-top: 1px solid var(--line); }
  .figures tr + tr > * { border-top: 0; }
  .figures th { width: auto; flex: 1 1 60%; padding-bottom: 0; }
  .figures td { flex: 1 1 100%; padding-top: 0; }
  .figures td.count { flex: 0 1 auto; padding: 0.32rem 0 0; }
}
.figures .count { width: 5rem; text-align: right; padding-right: 1.4rem; white-space: nowrap; }
.figures small { color: var(--muted); display: block; font-size: 0.84rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.6rem 1.6rem; font-size: 0.9rem; margin: 0 0 1.4rem; padding: 0; }
.legend li { list-style: none; display: flex; gap: 0.5rem; align-items: baseline; }
article { background: var(--raised); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 1.4rem; }
article header {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0.1rem 1.5rem; font-size: 0.86rem;
  padding: 0.6rem 1.1rem; border-bottom: 1px solid var(--line); color: var(--muted);
}
article header b { unicode-bidi: isolate; color: var(--ink); font-weight: 600; overflow-wrap: anywhere; min-width: 0; }
article header span { white-space: nowrap; font-variant-numeric: tabular-nums; }
.sequence { padding: 0.9rem 1.1rem 1rem; font: 1.02rem/1.75 var(--reading); }
.sequence .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; color: var(--muted); }
.learned.text, .learned.mark {
  color: var(--learned); background: var(--learned-bg); border-radius: 3px; padding: 0.08em 0.2em;
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
}
.mark { font: 0.8rem/1 var(--label); color: var(--muted); white-space: nowrap; }
.legend .slot { padding: 0 0.35rem; border-radius: 5px; }
.slots { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0.7rem; margin: 0.7rem 0; }
.slot { margin: 0; border: 2px solid var(--image); border-radius: 8px; padding: 0.3rem; }
.slot.dream { border-color: var(--dream); border-style: dashed; }
.slot img { display: block; border-radius: 4px; margin: 0 auto; max-width: 100%; }
.slot figcaption { font: 0.78rem/1.4 var(--label); padding: 0 0.15rem 0.25rem; color: var(--image); }
.slot.dream figcaption { color: var(--dream); }
.problems { padding: 0.6rem 1.1rem; border-top: 1px solid var(--line); font-size: 0.86rem; color: var(--bad); }
.problems p { margin: 0; overflow-wrap: anywhere; }
"""


def page(survey: Survey, title: str) -> str:
    """HTML of a survey. Text of documents is escaped; pictures are thumbnails inside the page."""
    body = [f"<main><h1>{escape(title)}</h1>", f'<p class="note">{escape(_lead(survey))}</p>', _table(survey)]
    if survey.shown:
        body += ["<h2>As the model sees them</h2>", _legend(survey), *map(_document, survey.shown)]
    return html_page(title, "\n".join([*body, "</main>"]), STYLE)


def _lead(survey: Survey) -> str:
    if survey.examined < survey.documents:
        return f"{survey.examined:,} of {survey.documents:,} documents were looked at, drawn at random."
    return f"All {survey.documents:,} documents were looked at."


def _table(survey: Survey) -> str:
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in figures(survey)]
    html = f'<table class="figures">{"".join(rows)}</table>'
    problems = problem_rows(survey.log)
    if problems:
        rows = [
            f'<tr><th>{escape(reason)}</th><td class="count">{count:,}</td>'
            f"<td>{escape(meaning)}<small>{escape(example)}</small></td></tr>"
            for reason, count, meaning, example in problems
        ]
        html += f'<h2>Problems</h2><table class="figures">{"".join(rows)}</table>'
    return html


def _legend(survey: Survey) -> str:
    learned = '<span class="text learned">learned</span> the model learns to write it'
    other = '<span class="mark">grey</span> it only reads it'
    image = '<span class="slot">IMG</span> a picture it sees'
    dream = '<span class="slot dream">DRM</span> a picture it creates'
    items = "".join(f"<li>{item}</li>" for item in (learned, other, image, dream))
    known = any(shown.tokens is not None for shown in survey.shown)
    hint = "" if known else '<p class="note">Without a model, tokens are not counted and nothing is cut.</p>'
    return f'<ul class="legend">{items}</ul>{hint}'


def _document(shown: Shown) -> str:
    counts = ""
    if shown.tokens is not None:
        counts = f"<span>{shown.tokens:,} tokens, {shown.learned:,} learned</span>"
    problems = "".join(f"<p>{escape(problem.message)}</p>" for problem in shown.problems)
    notes = f'<div class="problems">{problems}</div>' if problems else ""
    return (
        f"<article><header><b>{escape(shown.name or '(unnamed)')}</b>{counts}</header>"
        f'<div class="sequence">{_sequence(shown.segments)}</div>{notes}</article>'
    )


def _sequence(segments: list[Segment]) -> str:
    pieces: list[str] = []
    slots: list[str] = []
    for segment in segments:
        if segment.picture is not None:
            slots.append(_slot(segment, segment.picture))
            continue
        pieces += _closed(slots)
        learned = " learned" if segment.learned else ""
        if segment.kind == "text":
            title = "" if segment.tokens is None else f' title="{segment.tokens} tokens"'
            pieces.append(f'<span class="text{learned}"{title}>{escape(segment.text)}</span> ')
        else:
            mark = "begin" if segment.kind == "begin" else "end"
            pieces.append(f'<span class="mark{learned}">{mark}</span> ')
    return "".join([*pieces, *_closed(slots)])


def _closed(slots: list[str]) -> list[str]:
    """The pictures that stand side by side as one block; empties `slots`."""
    block = [f'<div class="slots">{"".join(slots)}</div>'] if slots else []
    slots.clear()
    return block


def _slot(segment: Segment, picture: Image.Image) -> str:
    name = "DRM" if segment.kind == "dream" else "IMG"
    words = [name if segment.tokens is None else f"{name}, {segment.tokens} tokens"]
    if segment.kind == "dream" and segment.learned:
        words.append('<span class="learned mark">start learned</span>')
    kind = " dream" if segment.kind == "dream" else ""
    alt = f"{'created' if kind else 'seen'} picture, {picture.width} x {picture.height} pixels"
    return f'<figure class="slot{kind}"><figcaption>{" ".join(words)}</figcaption>{_thumbnail(picture, alt)}</figure>'


def _thumbnail(picture: Image.Image, alt: str) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" title="{escape(alt)}" '
        f'width="{small.width}" height="{small.height}">'
    )
