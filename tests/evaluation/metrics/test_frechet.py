"""FID and KID: closed forms, properties, and torchmetrics with the same features where installed."""

import math
from typing import Optional

import numpy as np
import pytest
import torch

from dreamllm.evaluation.metrics import (
    FeatureStatistics,
    StatisticsSum,
    feature_statistics,
    frechet_distance,
    kernel_distance,
)
from dreamllm.evaluation.metrics.frechet import discrepancy
from tests.evaluation.metrics.oracles import functions_of


def normal(mean, covariance):
    return FeatureStatistics(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def features(seed, count=200, width=12, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + shift


def test_one_dimension_is_the_closed_form():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    assert frechet_distance(normal([1.0], [[4.0]]), normal([3.0], [[25.0]])) == pytest.approx(4 + 9, rel=1e-12)


def test_diagonal_covariances_are_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(30, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = torch.zeros(30, dtype=torch.float64)
    distance = frechet_distance(FeatureStatistics(mean, a.diag()), FeatureStatistics(mean + 0.5, b.diag()))
    assert distance == pytest.approx(float(30 * 0.25 + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


def test_a_general_pair_is_the_trace_of_the_matrix_root():
    """Against eigenvalues of the product itself, which is not symmetric."""
    a, b = feature_statistics(features(0)), feature_statistics(features(1, shift=2.0))
    root = np.sqrt(np.linalg.eigvals((a.covariance @ b.covariance).numpy()).astype(complex)).real.sum()
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances_need_no_correction():
    """Fewer samples than features, as in every small run."""
    a = feature_statistics(features(0, count=5, width=40))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(a.covariance.trace()))
    rotated = FeatureStatistics(a.mean + 1, a.covariance)
    assert frechet_distance(a, rotated) == pytest.approx(40, rel=1e-6)


def test_the_distance_is_symmetric():
    a, b = feature_statistics(features(0)), feature_statistics(features(1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_batches_add_up_to_the_whole():
    """Also with a mean a million times the deviation, where summing squares would lose everything."""
    values = features(0, count=101).double() + 1e6
    total = StatisticsSum()
    for part in values.split([1, 0, 50, 50]):
        total.add(part)
    found = total.statistics()
    torch.testing.assert_close(found.mean, values.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(values.T), rtol=1e-9, atol=1e-9)
    assert found.count == 101


def test_statistics_come_back_from_a_file(tmp_path):
    found = feature_statistics(features(0))
    found.save(tmp_path / "a.npz")
    loaded = FeatureStatistics.load(tmp_path / "a.npz")
    assert torch.equal(loaded.mean, found.mean)
    assert torch.equal(loaded.covariance, found.covariance)
    assert loaded.count == found.count


def test_published_files_have_no_count(tmp_path):
    np.savez(tmp_path / "b.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3))
    assert FeatureStatistics.load(tmp_path / "b.npz").count == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "it lacks sigma; it holds mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"a mean \[D\] and a covariance \[D, D\] are needed"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "allow_pickle"),
    ],
)
def test_other_files_are_described(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz is not a file of reference statistics: .*{message}"):
        FeatureStatistics.load(tmp_path / "a.npz")


def test_files_that_are_no_arrays_are_described(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match="is not a file of reference statistics"):
        FeatureStatistics.load(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="do not exist"):
        FeatureStatistics.load(tmp_path / "none.npz")


def test_statistics_need_two_pictures_of_one_network():
    with pytest.raises(ValueError, match="at least 2 pictures, not 1"):
        feature_statistics(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="have 1 and 2 features"):
        frechet_distance(normal([0.0], [[1.0]]), normal([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))


def test_discrepancy_by_hand():
    """Features of width 1: kernel (x y + 1)^3."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    # within: k(0, 1) = 1 and k(0, 2) = 1; across: k(0,0), k(0,2), k(1,0), k(1,2) = 1, 1, 1, 27
    assert discrepancy(a, b) == pytest.approx(1 + 1 - 2 * 30 / 4)


def test_subsets_are_drawn_from_the_seed():
    a, b = features(0), features(1)
    first, again, other = (kernel_distance(a, b, 5, 50, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.mean != other.mean
    assert math.isfinite(first.deviation)
    with pytest.raises(ValueError, match="at most 200"):
        kernel_distance(a, b)


def test_distances_are_those_of_torchmetrics():
    seen = {"torch": torch, "Tensor": torch.Tensor, "Optional": Optional}
    fid = functions_of("torchmetrics", "image/fid.py", "_compute_fid", **seen)["_compute_fid"]
    kid = functions_of("torchmetrics", "image/kid.py", "poly_mmd", "poly_kernel", "maximum_mean_discrepancy", **seen)
    a, b = features(0), features(1, shift=0.3)
    ours = frechet_distance(feature_statistics(a), feature_statistics(b))
    means = [v.double().mean(0) for v in (a, b)]
    theirs = fid(means[0], torch.cov(a.double().T), means[1], torch.cov(b.double().T))
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    assert discrepancy(a, b) == pytest.approx(float(kid["poly_mmd"](a.double(), b.double())), rel=1e-9)
