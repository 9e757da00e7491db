"""The figures of a survey as rows for a table, on the terminal or on a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dreamllm.data import ProblemLog
from dreamllm.data.problems import FILTERED_REASONS, KEPT_REASONS
from dreamllm.inspection.survey import Survey

_QUANTILES = (0.05, 0.5, 0.95)


def figures(survey: Survey) -> list[tuple[str, str]]:
    """(name, value) of everything that was counted."""
    usable = len(survey.characters)
    rows = [
        ("kind", survey.kind),
        ("documents", f"{survey.documents:,}"),
        (
            "looked at",
            f"{survey.examined:,}: {usable:,} usable, {survey.log.bad:,} unusable, {survey.log.filtered:,} filtered",
        ),
    ]
    if usable:
        pictures = sum(survey.pictures)
        rows += [
            ("pictures", f"{pictures:,}, {pictures / usable:.2f} per document, {survey.created:,} to create"),
            ("characters of text", quantiles(survey.characters)),
        ]
    if survey.tokens:
        share = sum(survey.learned) / sum(survey.tokens)
        rows += [
            ("tokens", quantiles(survey.tokens)),
            ("learned tokens", f"{quantiles(survey.learned)} ({share:.0%} of all)"),
        ]
    return rows


def quantiles(values: Sequence[int]) -> str:
    """5%, median, 95% and the extremes."""
    low, middle, high = (f"{value:,.0f}" for value in np.quantile(values, _QUANTILES))
    return f"median {middle}, 5% {low}, 95% {high}, from {min(values):,} to {max(values):,}"


def problem_rows(log: ProblemLog) -> list[tuple[str, int, str, str]]:
    """(reason, count, what became of the samples, an example), the most frequent first."""
    rows = []
    for reason, count in sorted(log.counts.items(), key=lambda item: -item[1]):
        kept, filtered = reason in KEPT_REASONS, reason in FILTERED_REASONS
        meaning = "used, but changed" if kept else "left out by a filter" if filtered else "cannot be used"
        rows.append((reason.replace("_", " "), count, meaning, log.examples[reason][0]))
    return rows
