"""Answers of yes and no to questions about objects (POPE, Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

YesNo = Literal["yes", "no"]


@dataclass(frozen=True)
class YesNoScores:
    """All shares in [0, 1]; "yes" is the positive class. A share of nothing is 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def read_yes_no(text: str) -> YesNo:
    """The published reading of a free answer: "no" if its first sentence has the word No, no or not, else "yes"."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def yes_no_scores(predictions: Sequence[YesNo], labels: Sequence[YesNo]) -> YesNoScores:
    """Scores of `predictions`. Raises `ValueError` for other values than "yes" and "no", and for unequal lengths."""
    unknown = {*predictions, *labels} - {"yes", "no"}
    if unknown:
        raise ValueError(f"answers and labels must be 'yes' or 'no', not {sorted(unknown)[0]!r}")
    pairs = list(zip(predictions, labels, strict=True))
    both = pairs.count(("yes", "yes"))
    said, true = predictions.count("yes"), labels.count("yes")
    precision, recall = _share(both, said), _share(both, true)
    return YesNoScores(
        accuracy=_share(sum(p == t for p, t in pairs), len(pairs)),
        precision=precision,
        recall=recall,
        f1=_share(2 * precision * recall, precision + recall),
        yes_ratio=_share(said, len(pairs)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
