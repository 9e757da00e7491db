"""Distances between sets of pictures in a network's features: FID (Heusel et al. 2017), KID (Binkowski et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dreamllm.training import write_file

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class FeatureStatistics:
    """A normal distribution of features: `mean` float64 [D], `covariance` float64 [D, D], `count` samples (0: unknown).

    Raises `ValueError` when made with other shapes or values that are not finite.
    """

    mean: Tensor
    covariance: Tensor
    count: int = 0

    def __post_init__(self) -> None:
        width = self.mean.shape[-1] if self.mean.ndim else 0
        if self.mean.shape != (width,) or self.covariance.shape != (width, width) or not width:
            raise ValueError(
                f"a mean [D] and a covariance [D, D] are needed, not {[*self.mean.shape]}, {[*self.covariance.shape]}"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the statistics of features hold values that are not finite")

    @staticmethod
    def load(path: Path) -> FeatureStatistics:
        """Reads `mu` and `sigma` (and `count`) from an `.npz` file, the published form of reference statistics.

        Raises `FileNotFoundError`, and `ValueError` for a file that does not hold them. Nothing is unpickled.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"the reference statistics {path} do not exist")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                missing = [name for name in ("mu", "sigma") if name not in arrays]
                if missing:
                    raise ValueError(f"it lacks {' and '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
                mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
                count = int(arrays["count"]) if "count" in arrays else 0
                return FeatureStatistics(mean, covariance, count)
        except (ValueError, OSError, EOFError, KeyError, TypeError, BadZipFile) as error:
            raise ValueError(f"{path} is not a file of reference statistics: {error}") from error

    def save(self, path: Path) -> None:
        """Writes `mu`, `sigma` and `count`, complete or not at all."""
        mean, covariance, count = self.mean.numpy(), self.covariance.numpy(), np.array(self.count)
        write_file(Path(path), lambda file: np.savez(file, mu=mean, sigma=covariance, count=count))


class StatisticsSum:
    """Adds features up batch by batch, in float64 around the running mean (Chan et al. 1983)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """`features` [N, D]."""
        if features.ndim != 2:
            raise ValueError(f"features must be [N, D], not {[*features.shape]}")
        if not len(features):
            return
        values = features.detach().double().cpu()
        mean = values.mean(0)
        centred = values - mean
        scatter, count = centred.T @ centred, len(values)
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter, self._count = mean, scatter, count
            return
        total, step = self._count + count, mean - self._mean
        self._scatter += scatter + torch.outer(step, step) * (self._count * count / total)
        self._mean += step * (count / total)
        self._count = total

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance (divided by N - 1). Raises `ValueError` for fewer than two samples."""
        if self._mean is None or self._scatter is None or self._count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, not {self._count}")
        return FeatureStatistics(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Statistics of `features` [N, D]."""
    total = StatisticsSum()
    total.add(features)
    return total.statistics()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64 (Dowson and Landau 1982).

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2), so singular covariances need no
    correction. Raises `ValueError` for different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the statistics have {len(a.mean)} and {len(b.mean)} features; they must be of one network")
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    difference = a.mean.double() - b.mean.double()
    distance = difference @ difference + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    matrix = covariance.double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # What rounding leaves of a zero eigenvalue is of either sign, and its root would be far larger than itself.
    noise = len(values) * torch.finfo(torch.float64).eps * values.abs().amax()
    return (vectors * torch.where(values > noise, values, 0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the squared discrepancy over random subsets."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """KID of features [N, D] and [M, D]: `discrepancy` on random subsets, drawn without repetition from `seed`.

    Raises `ValueError` when a set has fewer samples than `subset_size`.
    """
    least = min(len(a), len(b))
    if not 2 <= subset_size <= least:
        raise ValueError(
            f"subset_size {subset_size} must be at least 2 and at most {least}, the size of the smaller set"
        )
    generator = torch.Generator().manual_seed(seed)

    def drawn(features: Tensor) -> Iterator[Tensor]:
        for _ in range(subsets):
            yield features[torch.randperm(len(features), generator=generator)[:subset_size]]

    values = torch.tensor([discrepancy(x, y) for x, y in zip(drawn(a), drawn(b), strict=True)], dtype=torch.float64)
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), subsets, subset_size)


def discrepancy(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy [n, D] against [m, D] with the kernel (x y / D + 1)^3, in float64."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within_a = (aa.sum() - aa.trace()) / (len(a) * (len(a) - 1))
    within_b = (bb.sum() - bb.trace()) / (len(b) * (len(b) - 1))
    return float(within_a + within_b - 2 * ab.mean())
