"""Records as Markdown and as one HTML page that needs nothing else: the same tables, the page with charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting.charts import bar_chart, roofline, trend_chart
from benchmarks.reporting.history import Trend, committed_versions, trends
from benchmarks.reporting.records import Record, load_record
from benchmarks.reporting.static import static_report
from benchmarks.reporting.tables import (
    Table,
    absent_peers,
    boundary_table,
    extrapolated_table,
    markdown_text,
    operator_table,
    summary,
    times,
)
from dreamllm.inference.page import escape, html_page

TITLE = "Benchmarks of dreamkernels"
LEAD = (
    "Times are the best of many rounds, contenders taking turns in one process. In brackets: how many times as fast "
    "ours is. Only ratios within one record mean something on a shared machine."
)
SPEED = (
    "“Of copy bandwidth” compares with a copy of as many bytes as the case must move, timed in the same rounds; with "
    "warm caches or much arithmetic it says little. GFLOP/s count the operations that the case needs."
)
BARS = "How many times as fast ours is as each peer; logarithmic, from 1x: to the right ours is faster."
EXTRAPOLATED = "Extrapolated, not measured"
EXTRAPOLATION = (
    "A model that does not fit one device was measured with two smaller numbers of layers. Time is drawn on along the "
    "straight line through both medians; the spread takes the tenth and ninetieth percentiles where they differ most."
)
STYLE = """
body { font-size: 1.0625rem; }
main { max-width: 64rem; }
h1 { margin-bottom: 0.4rem; }
h2 { font-size: 1.4rem; margin: 4rem 0 0.6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2.6rem 0 0.5rem; }
.lead, .note { color: var(--muted); max-width: 46rem; margin: 0 0 1.2rem; }
.problem { color: var(--bad); max-width: 46rem; margin: 0 0 0.6rem; }
.lead { font-size: 1.12rem; } .note { font-size: 0.95rem; }
nav { display: flex; flex-wrap: wrap; gap: 0 1.3rem; font: 0.92rem/1.7 var(--label); }
a { color: var(--accent); text-underline-offset: 0.15em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.2rem; font: 0.88rem/1.5 var(--label);
  margin: 0 0 1.5rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0 0 1.4rem; }
table { border-collapse: collapse; font: 0.84rem/1.4 var(--label); min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0 0.3rem 1.1rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 13rem; }
.chart { width: 100%; min-width: 38rem; height: auto; display: block; font: 11px var(--label); fill: var(--muted); }
.chart.bars { min-width: 0; max-width: 44rem; font-size: 12px; }
.chart .grid { stroke: var(--line); } .chart .one { stroke: var(--muted); }
.chart .case, .chart .name { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.chart .bar { fill: var(--accent); opacity: 0.75; } .chart .slower { fill: var(--bad); }
.chart .value, .chart .case { fill: var(--ink); font-weight: 600; } .chart .dot { fill: var(--accent); }
.chart path { fill: none; stroke: var(--accent); stroke-linejoin: round; stroke-width: 1.6; }
.chart .limit { stroke: var(--ink); stroke-width: 1.2; } .chart .usual { stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font: 0.84rem/1.5 var(--label); margin: 0.3rem 0 1rem; }
.trends { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem 2rem; }
.trends figure { margin: 0; max-width: 30rem; } .trends .chart { min-width: 0; }
.trends figcaption { font: 0.84rem/1.4 var(--label); }
"""


@dataclass(frozen=True)
class Section:
    """A record with what its folder's git history says."""

    record: Record
    trends: list[Trend]
    history: str  # the sentence above them, or why there are none


def make_section(path: Path) -> Section:
    record = load_record(path)
    try:
        versions = committed_versions(path)
    except RuntimeError as error:
        return Section(record, [], f"No history: {error}.")
    found = trends(versions)
    if not found:
        count = f"{len(versions)} committed version{'' if len(versions) == 1 else 's'}"
        return Section(record, [], f"No history yet: {count} of this record, two under the same conditions are needed.")
    return Section(record, found, "Committed versions of this record that were measured under the same conditions. The "
                   "figure is the geometric mean over the cases that all of them have.")  # fmt: skip


def write_report(paths: Sequence[Path], folder: Path, skipped: Sequence[str] = ()) -> tuple[Path, Path]:
    """Writes `report.md` and `report.html` into `folder`; `skipped` are sentences on files that were left out.

    Raises ValueError or FileNotFoundError naming a record that cannot be read.
    """
    sections = [make_section(path) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(as_markdown(sections, skipped), encoding="utf-8")
    page.write_text(as_html(sections, skipped), encoding="utf-8")
    return markdown, page


def roofline_note(record: Record) -> str:
    cases = [case for case in record.cases if case.flops_per_byte]
    left_out = len(record.cases) - len(cases)
    limits = (
        "Horizontal lines: the fastest square matrix product of the run."
        if record.matmul_gflops
        else "The record has no measured limit of arithmetic, so no horizontal line is drawn."
    )
    copies = (
        "Sloping lines: the fastest and the median of the copies timed beside the cases, each of as many bytes as its "
        "case moves; a point may lie above a line that cases of other sizes made."
        if any(case.copy_gb_per_second for case in record.cases)
        else "The record has no copies, so no sloping line is drawn."
    )
    without = f" {left_out} cases that declare no operations are not shown." if left_out else ""
    return f"Filled: ours; hollow: eager, or a case's first peer. Both axes are logarithmic. {copies} {limits}{without}"


def trend_table(found: Sequence[Trend]) -> Table:
    rows = []
    for trend in found:
        rows += [
            [trend.operator, f"{commit}, {date}", trend.reference, str(trend.cases), times(ratio)]
            for commit, date, ratio in trend.points
        ]
    return Table(["operator", "commit", "against", "cases", "times as fast"], rows)


def as_markdown(sections: Sequence[Section], skipped: Sequence[str] = ()) -> str:
    blocks = [f"# {TITLE}", LEAD, SPEED, *map(markdown_text, skipped)]
    for section in sections:
        record = section.record
        blocks += [f"## {markdown_text(record.name)}", Table(["measured", ""], record.environment()).markdown()]
        blocks += [*map(markdown_text, record.problems()), summary(record).markdown()]
        for operator, cases in record.operators.items():
            blocks += [f"### {markdown_text(operator)}", operator_table(cases).markdown()]
            blocks += [markdown_text(" ".join(absent_peers(cases)))] if absent_peers(cases) else []
        if record.extrapolations:
            blocks += [f"### {EXTRAPOLATED}", EXTRAPOLATION, extrapolated_table(record).markdown()]
        for name, rows in record.boundary_us.items():
            blocks += [f"### {markdown_text(name)}: cost of a call", boundary_table(rows).markdown()]
        blocks += ["### History", markdown_text(section.history)]
        if section.trends:
            blocks.append(trend_table(section.trends).markdown())
    if static := static_report("sm_80"):
        table, note = static
        blocks += ["## GPU kernels, compiled for sm_80", markdown_text(note), table.markdown()]
    return "\n\n".join(blocks) + "\n"


def as_html(sections: Sequence[Section], skipped: Sequence[str] = ()) -> str:
    static = static_report("sm_80")
    links = [(f"record-{number}", section.record.name) for number, section in enumerate(sections)]
    links += [("static", "GPU kernels for sm_80")] if static else []
    nav = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in links)
    parts = [f'<h1>{TITLE}</h1><p class="lead">{escape(LEAD)}</p><p class="note">{escape(SPEED)}</p>']
    parts += [f'<p class="note">{escape(sentence)}</p>' for sentence in skipped]
    parts.append(f"<nav>{nav}</nav>")
    parts += [_record_html(section, f"record-{number}") for number, section in enumerate(sections)]
    if static:
        table, note = static
        parts.append(
            f'<section id="static"><h2>GPU kernels, compiled for sm_80</h2><p class="note">{escape(note)}</p>'
            f"{_table_html(table)}</section>"
        )
    return html_page(TITLE, f"<main>{''.join(parts)}</main>", STYLE)


def _record_html(section: Section, anchor: str) -> str:
    record = section.record
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in record.environment())
    parts = [f"<h2>{escape(record.name)}</h2><dl>{facts}</dl>"]
    parts += [f'<p class="problem">{escape(sentence)}</p>' for sentence in record.problems()]
    parts.append(_table_html(summary(record)))
    if drawn := roofline(record):
        svg, legend = drawn
        parts.append(
            f'<h3>Roofline</h3><p class="note">{roofline_note(record)}</p>{legend}<div class="wide">{svg}</div>'
        )
    for operator, cases in record.operators.items():
        parts.append(f"<h3>{escape(operator)}</h3>{_table_html(operator_table(cases))}")
        if absent := absent_peers(cases):
            parts.append(f'<p class="note">{escape(" ".join(absent))}</p>')
        if chart := bar_chart(cases):
            parts.append(f'<p class="note">{BARS}</p><div class="wide">{chart}</div>')
        if rows := record.boundary_us.get(operator):
            parts.append(_table_html(boundary_table(rows)))
    if record.extrapolations:
        table = _table_html(extrapolated_table(record))
        parts.append(f'<h3>{EXTRAPOLATED}</h3><p class="note">{escape(EXTRAPOLATION)}</p>{table}')
    for name, rows in record.boundary_us.items():
        if name not in record.operators:
            parts.append(f"<h3>{escape(name)}: cost of a call</h3>{_table_html(boundary_table(rows))}")
    figures = "".join(
        f"<figure><figcaption>{escape(trend.operator)}, times as fast as {escape(trend.reference)}, {trend.cases} case"
        f"{'s' * (trend.cases > 1)}"
        f"</figcaption>{trend_chart(trend)}</figure>"
        for trend in section.trends
    )
    parts.append(f'<h3>History</h3><p class="note">{escape(section.history)}</p>')
    if figures:
        parts.append(f'<div class="trends">{figures}</div>{_table_html(trend_table(section.trends))}')
    return f'<section id="{anchor}">{"".join(parts)}</section>'


def _table_html(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
