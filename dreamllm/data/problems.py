"""Samples that cannot be used: why, how many, and when a run must stop because of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Reason = Literal[
    "missing_image",
    "corrupt_image",
    "missing_caption",
    "empty_caption",
    "malformed",
    "picture_slots",
    "too_long",
    "too_many_pictures",
    "nothing_to_learn",
    "truncated_archive",
    "changed_file",
    "duplicate_key",
    "oversized",
    "small_picture",
    "few_pictures",
    "low_similarity",
    "other_language",
    "blacklisted",
    "url_caption",
    "trimmed",
    "lost_picture",
    "filtered_picture",
]
"""Why a sample was left out, or (`KEPT_REASONS`) changed: its text was cut at the context, or it lost a picture."""

FILTERED_REASONS = (
    "small_picture",
    "few_pictures",
    "low_similarity",
    "other_language",
    "blacklisted",
    "url_caption",
)
"""A filter left the sample out: nothing is wrong with it, so it does not count towards the limit that stops a run."""

KEPT_REASONS = ("trimmed", "lost_picture", "filtered_picture")
EXAMPLES_PER_REASON = 3


class BadSampleError(ValueError):
    """A sample that cannot be used. `reason` is one of `Reason`; the message names the sample."""

    def __init__(self, reason: Reason, message: str) -> None:
        assert reason in get_args(Reason)
        super().__init__(message)
        self.reason = reason


class FilteredSampleError(BadSampleError):
    """A sample that a filter left out. `reason` is one of `FILTERED_REASONS`."""

    def __init__(self, reason: Reason, message: str) -> None:
        assert reason in FILTERED_REASONS
        super().__init__(reason, message)


class TooManyBadSamplesError(ValueError):
    """So many samples were unusable that the data, not a sample, is wrong. The message names examples."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one sample. `reason` in `KEPT_REASONS` means that the sample was used nevertheless."""

    reason: Reason
    message: str

    @property
    def kept(self) -> bool:
        return self.reason in KEPT_REASONS

    @property
    def filtered(self) -> bool:
        """Whether a filter left the sample out, so that it counts neither as used nor as bad."""
        return self.reason in FILTERED_REASONS


@dataclass
class ProblemLog:
    """Counts problems by reason over a run and stops it when too many samples are unusable.

    `max_bad_fraction`: the largest tolerated share of unusable samples among all that were drawn, judged once
    `min_documents` have been drawn. `documents` counts the samples drawn that no filter left out; `counts` problems by
    reason, filtered samples included; `examples` up to three messages of each reason.
    """

    max_bad_fraction: float = 0.1
    min_documents: int = 100
    documents: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, used: int, problems: Iterable[Problem]) -> None:
        """Records a batch of `used` documents. Raises `TooManyBadSamplesError` beyond the tolerated share."""
        self.documents += used
        for problem in problems:
            self.documents += not (problem.kept or problem.filtered)
            self.counts[problem.reason] = self.counts.get(problem.reason, 0) + 1
            examples = self.examples.setdefault(problem.reason, [])
            if len(examples) < EXAMPLES_PER_REASON and problem.message not in examples:
                examples.append(problem.message)
        if self.documents >= self.min_documents and self.bad > self.max_bad_fraction * self.documents:
            raise TooManyBadSamplesError(
                f"{self.bad} of {self.documents} samples could not be used, more than the tolerated "
                f"{self.max_bad_fraction:.0%} (max_bad_fraction):\n{self.summary()}"
            )

    @property
    def bad(self) -> int:
        """How many samples were left out because they cannot be used."""
        return sum(count for r, count in self.counts.items() if r not in KEPT_REASONS and r not in FILTERED_REASONS)

    @property
    def filtered(self) -> int:
        """How many samples filters left out."""
        return sum(count for reason, count in self.counts.items() if reason in FILTERED_REASONS)

    def summary(self) -> str:
        """One line per reason with its count and examples; empty when there was no problem."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            lines.append(f"  {reason}: {count}, for example {'; '.join(self.examples[reason])}")
        return "\n".join(lines)

    @staticmethod
    def merge(logs: Sequence[ProblemLog]) -> ProblemLog:
        """One log of what several processes found."""
        merged = ProblemLog(logs[0].max_bad_fraction, logs[0].min_documents)
        for log in logs:
            merged.documents += log.documents
            for reason, count in log.counts.items():
                merged.counts[reason] = merged.counts.get(reason, 0) + count
                examples = merged.examples.setdefault(reason, [])
                new = [message for message in log.examples[reason] if message not in examples]
                examples += new[: EXAMPLES_PER_REASON - len(examples)]
        return merged

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self.documents, "counts": dict(self.counts), "examples": dict(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.documents = state["documents"]
        self.counts = dict(state["counts"])
        self.examples = {reason: list(messages) for reason, messages in state["examples"].items()}
