"""Single-choice questions: which option a free answer means, and accuracy where a question is asked in rotations."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

LETTERS = "ABCDE"
ROTATION = 1_000_000
"""MMBench numbers the rotations of a question by its own index plus multiples of this."""

# In this order: a bare letter, then a letter before or between these marks.
_MARKS = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_NUMBERED = re.compile(r"\((\d)\)|(?<!\w)(\d)(?!\w)")


def match_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that `answer` means, by the rules of MMBench's own evaluation; None where unclear.

    First a letter that stands as a word of its own, bare or with `.`, `:`, `)` and the like, if exactly one does ("A"
    in an answer of more than three words counts as an article). Then the option whose text is in the answer, if exactly
    one is. The benchmark's server asks a language model about the rest.
    """
    return _by_letter(answer) or _by_text(answer, options)


def match_numbered(answer: str, options: Mapping[str, str]) -> str | None:
    """As `match_option`, where the options were shown as (0), (1), ...: exactly one such number decides first."""
    letters = list(options)
    numbers = {int(a or b) for a, b in _NUMBERED.findall(answer)}
    if len(numbers) == 1 and (number := numbers.pop()) < len(letters):
        return letters[number]
    return match_option(answer, options)


def _by_letter(answer: str) -> str | None:
    words = answer.split()
    article = "A" in words and len(words) > 3
    for before, after in _MARKS:
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        if len(found) == 1 and not (article and not before and not after):
            return found[0]
    return None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    lowered = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


def grouped_accuracy(right: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """The share of groups in which everything is right (MMBench's circular evaluation); 0 without groups."""
    verdicts: dict[Hashable, bool] = {}
    for one, group in zip(right, groups, strict=True):
        verdicts[group] = verdicts.get(group, True) and one
    return sum(verdicts.values()) / len(verdicts) if verdicts else 0.0


def mmbench_question(index: int) -> int:
    """The question that row `index` of an MMBench file asks, the same for all its rotations."""
    return index % ROTATION
