"""The page of a benchmark's results: figures, the paper's rows beside ours, examples with failures first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamllm.documents import PictureSource, load_picture
from dreamllm.evaluation.benchmarks.base import Figure
from dreamllm.evaluation.paper import TABLES, Table
from dreamllm.inference.page import data_uri, escape, report_page

WORST, BEST = 24, 6
THUMBNAIL = 320
MOST_TEXT, MOST_REFERENCES = 400, 3

STYLE = """
.note { font: 0.9rem/1.5 var(--label); }
.figures { display: flex; flex-wrap: wrap; gap: 0.6rem 2.6rem; margin: 1.6rem 0 0; padding: 0; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.figures dt { font: 0.82rem/1.35 var(--label); color: var(--muted); max-width: 15rem; }
.figures dd { margin: 0; font: 600 1.25rem/1.3 var(--label); font-variant-numeric: tabular-nums; }
.figures div:first-child { flex-basis: 100%; }
.figures div:first-child dd { font-size: 3rem; line-height: 1.1; letter-spacing: -0.02em; }
.figures div.none dd { font: italic 1rem/1.5 var(--label); color: var(--muted); letter-spacing: 0; }
table { border-collapse: collapse; font: 0.9rem/1.4 var(--label); font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.42rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 400; }
tr.ours th, tr.ours td { font-weight: 650; color: var(--accent); border-bottom-width: 2px; }
td.none { color: var(--muted); font-weight: 400 !important; }
.examples { display: grid; gap: 1.6rem 1.5rem; }
.examples { grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
.example { margin: 0; border-top: 3px solid var(--line); padding-top: 0.7rem; }
.example.bad { border-color: var(--bad); } .example.good { border-color: var(--good); }
.example img { display: block; height: 12rem; width: auto; max-width: 100%; object-fit: contain; }
.example img.px { height: 8rem; }
details { margin: 1.8rem 0 0; } summary { cursor: pointer; font: 0.9rem/1.5 var(--label); color: var(--muted); }
details table { margin: 0.6rem 0 0; width: auto; } details tr > * { vertical-align: baseline; }
details td { text-align: left; white-space: pre-line; }
.example p { font: 0.92rem/1.45 var(--label); margin: 0.55rem 0 0; }
.example .question { color: var(--muted); white-space: pre-line; }
.example .said { font-weight: 600; }
.example .references { color: var(--muted); }
.example .grade { float: right; font: 0.82rem/1.6 var(--label); color: var(--muted); margin: 0 0 0 0.8rem; }
"""


@dataclass(frozen=True)
class Example:
    """A sample as the page shows it. `score` in [0, 1], or None: neither good nor bad."""

    picture: PictureSource | None
    question: str
    said: str
    references: tuple[str, ...]
    score: float | None


@dataclass(frozen=True)
class Page:
    """`ours`: this model's headline figures by benchmark, from this run and those beside it."""

    results: Mapping[str, Any]
    figures: tuple[Figure, ...]
    examples: tuple[Example, ...]
    ours: Mapping[str, str]


def write_page(page: Page) -> str:
    """HTML that needs nothing else. Raises `PictureError` for a picture of an example that cannot be read."""
    results = page.results
    sections = [_introduction(page), _figures(page.figures), _asked(results)]
    sections += [_table(table, page) for table in TABLES if results["benchmark"] in dict(table.columns)]
    sections.append(_examples(page.examples))
    return report_page(f"{results['title']}: {_model(results)}", "".join(sections), STYLE)


def _model(results: Mapping[str, Any]) -> str:
    """The model's name, without its digest."""
    return str(results["model"]).rpartition(" ")[0]


def _introduction(page: Page) -> str:
    results = page.results
    paper = f" The paper reports {escape(results['paper'])}." if results["paper"] else ""
    return (
        f"<h1>{escape(results['title'])}</h1>"
        f'<p class="lead">{escape(_model(results))}, {results["samples"]:,} samples of {escape(results["split"])}, '
        f"by the {escape(results['protocol'])} protocol.{paper}</p>"
    )


def _asked(results: Mapping[str, Any]) -> str:
    """What the protocol says, as it is in the results, folded away."""
    values: dict[str, Any] = {}
    for name in ("prompting", "drawing", "changes"):
        for key, value in results.get(name, {}).items():
            values |= {f"{key}, {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th>"
        f"<td>{escape('yes' if value is True else str(value).strip())}</td></tr>"
        for name, value in values.items()
        if value not in ("", None, False)
    )
    table = f'<div class="scroll"><table>{rows}</table></div>'
    return f"<details><summary>What the protocol says</summary>{table}</details>" if rows else ""


def _figures(figures: Sequence[Figure]) -> str:
    items = [
        f"<div{'' if figure.value is not None else ' class=none'}><dt>{escape(figure.name)}</dt>"
        f"<dd>{escape(str(figure))}</dd></div>"
        for figure in figures
    ]
    return f'<dl class="figures">{"".join(items)}</dl>'


def _table(table: Table, page: Page) -> str:
    heads = "".join(f"<th>{escape(title)}</th>" for _, title in table.columns)
    rows = [(name, values, "") for name, values in table.rows]
    ours = tuple(page.ours.get(name, "") for name, _ in table.columns)
    rows.append((_model(page.results), ours, ' class="ours"'))
    body = "".join(
        f"<tr{style}><th>{escape(name)}</th>{''.join(map(_cell, values))}</tr>" for name, values, style in rows
    )
    limited = (
        "In brackets: the number of samples, where a run took the first ones only." if "(" in "".join(ours) else ""
    )
    texts = " ".join(filter(None, [table.note, limited]))
    note = f'<p class="note">{escape(texts)}</p>' if texts else ""
    return (
        f'<h2>{escape(table.title)}</h2>{note}<div class="scroll"><table><thead><tr><th>model</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>" if text else '<td class="none">-</td>'


def _examples(examples: Sequence[Example]) -> str:
    if all(example.score is None for example in examples):
        note = f"The first {min(WORST, len(examples))} of {len(examples)}, not a selection."
        return f'<h2>Examples</h2><p class="note">{note}</p>{_grid(examples[:WORST])}'
    order = sorted(range(len(examples)), key=lambda i: (examples[i].score or 0.0, i))
    worst = [examples[i] for i in order[:WORST] if (examples[i].score or 0.0) < 1]
    best = [examples[i] for i in reversed(order[len(worst) :])][:BEST]
    sections = []
    if worst:
        sections.append(f'<h2>The worst</h2><p class="note">Lowest score first.</p>{_grid(worst)}')
    if best:
        sections.append(f"<h2>The best</h2>{_grid(best)}")
    return "".join(sections)


def _grid(examples: Sequence[Example]) -> str:
    return f'<div class="examples">{"".join(map(_example, examples))}</div>'


def _example(example: Example) -> str:
    style = "" if example.score is None else " bad" if example.score < 0.5 else " good"
    grade = "" if example.score is None else f'<span class="grade">{example.score:.2f}</span>'
    question = f'<p class="question">{escape(_cut(example.question))}</p>' if example.question else ""
    said = escape(_cut(example.said)) or "(nothing)"
    caption = f'{question}<p class="said">{grade}{said}</p>{_references(example.references)}'
    return f'<figure class="example{style}">{_thumbnail(example.picture)}<figcaption>{caption}</figcaption></figure>'


def _thumbnail(source: PictureSource | None) -> str:
    if source is None:
        return ""
    picture = load_picture(source)
    tiny = max(picture.size) <= THUMBNAIL // 4
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return f'<img{" class=px" if tiny else ""} src="{data_uri(picture)}" alt="">'


def _references(references: Sequence[str]) -> str:
    if not references:
        return ""
    different = list(dict.fromkeys(references))
    shown = "; ".join(_cut(reference) for reference in different[:MOST_REFERENCES])
    more = f" (and {len(different) - MOST_REFERENCES} more)" if len(different) > MOST_REFERENCES else ""
    return f'<p class="references">expected: {escape(shown)}{more}</p>'


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT].rstrip()} …"
