"""The scanned digits that the digits model is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

try:
    from sklearn.datasets import load_digits
except ImportError:  # scikit-learn comes with the extra `demo`
    load_digits = None

TRAIN_SCANS, TOTAL_SCANS = 1500, 1797


@dataclass(frozen=True)
class Scans:
    """Scanned digits: `pictures` uint8 [N, 8, 8], 0 background to 255 ink; `labels` int64 [N]."""

    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, number: int) -> np.ndarray:
        """Positions of the scans that show `number`, int64 [n]."""
        return np.flatnonzero(self.labels == number)


def load_scans() -> tuple[Scans, Scans]:
    """scikit-learn's digits: the first 1,500 to train on and the last 297, never to be trained on.

    Raises `ModuleNotFoundError` when scikit-learn is not installed.
    """
    if load_digits is None:
        raise ModuleNotFoundError(
            "the scanned digits come with scikit-learn; install it with: pip install scikit-learn"
        )
    data = load_digits()
    pictures = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    assert len(labels) == TOTAL_SCANS
    return Scans(pictures[:TRAIN_SCANS], labels[:TRAIN_SCANS]), Scans(pictures[TRAIN_SCANS:], labels[TRAIN_SCANS:])
