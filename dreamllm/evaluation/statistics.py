"""Shares with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """`right` of `total` trials succeeded."""

    right: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.total or self.total == 0:
            raise ValueError(f"{self.right} of {self.total} is not a proportion")

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval of the success probability (Wilson 1927)."""
        n, p, z2 = self.total, self.share, Z_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "right": self.right,
            "total": self.total,
            "share": round(self.share, 6),
            "interval_95": [round(low, 6), round(high, 6)],
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({self.right} of {self.total}, 95% interval {low:.1%} to {high:.1%})"
