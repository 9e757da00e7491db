"""An independent judge of drawn digits: a support vector machine that has seen real training scans only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

try:
    from sklearn.svm import SVC
except ImportError:  # scikit-learn comes with the extra `demo`
    SVC = None

_SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


@dataclass(frozen=True)
class JudgeConfig:
    """`penalty`: of the support vector machine with a Gaussian kernel (its C). `shifts`: also learn every scan moved by
    one pixel in each of the four directions."""

    penalty: float = 10.0
    shifts: bool = True


class DigitsJudge:
    """Classifies 8-pixel digits. Knows nothing of the model it judges and none of that model's features.

    Trained on `pictures` uint8 [N, 8, 8] (0 background to 255 ink) and `labels` int [N]; deterministic. Raises
    `ModuleNotFoundError` without scikit-learn, and `ValueError` for pictures of another form.
    """

    def __init__(self, pictures: np.ndarray, labels: np.ndarray, config: JudgeConfig | None = None) -> None:
        if SVC is None:
            raise ModuleNotFoundError("the judge comes from scikit-learn; install it with: pip install scikit-learn")
        config = config or JudgeConfig()
        shifts = _SHIFTS if config.shifts else _SHIFTS[:1]
        moved = np.concatenate([_moved(_checked(pictures), down, across) for down, across in shifts])
        self._machine = SVC(C=config.penalty).fit(_features(moved), np.tile(labels, len(shifts)))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, 8, 8] -> labels int64 [N]."""
        if not len(_checked(pictures)):
            return np.empty(0, dtype=np.int64)
        return self._machine.predict(_features(pictures)).astype(np.int64)

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, 8, 8] -> float64 [N, 10]: how much each number speaks for itself, the decision function."""
        return self._machine.decision_function(_features(_checked(pictures)))

    def accuracy(self, pictures: np.ndarray, labels: np.ndarray) -> float:
        """Share of scans it classifies rightly: what its verdicts on drawn digits are worth."""
        return float(np.mean(self(pictures) == labels))


def _checked(pictures: np.ndarray) -> np.ndarray:
    if pictures.dtype != np.uint8 or pictures.ndim != 3 or pictures.shape[1:] != (8, 8):
        raise ValueError(f"pictures must be uint8 [N, 8, 8], not {pictures.dtype} {list(pictures.shape)}")
    return pictures


def _features(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), 64) / 255.0


def _moved(pictures: np.ndarray, down: int, across: int) -> np.ndarray:
    """Moved by whole pixels; background comes in."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 9 - down, 1 - across : 9 - across]
