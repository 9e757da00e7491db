"""The judge of drawn digits."""

import numpy as np
import pytest

from dreamllm.evaluation.digits_judge import DigitsJudge, JudgeConfig
from dreamllm.evaluation.digits_scans import load_scans


@pytest.fixture(scope="module")
def scans():
    return load_scans()


@pytest.fixture(scope="module")
def judge(scans):
    train, _ = scans
    return DigitsJudge(train.pictures, train.labels)


def test_it_classifies_unseen_scans(scans, judge):
    _, unseen = scans
    assert judge.accuracy(unseen.pictures, unseen.labels) > 0.95


def test_it_tolerates_a_shift_better_for_having_learned_shifts(scans, judge):
    train, unseen = scans
    moved = np.roll(unseen.pictures, 1, axis=2)
    moved[:, :, 0] = 0
    plain = DigitsJudge(train.pictures, train.labels, JudgeConfig(shifts=False))
    assert judge.accuracy(moved, unseen.labels) > plain.accuracy(moved, unseen.labels) + 0.1


def test_two_judges_agree(scans, judge):
    train, _ = scans
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    np.testing.assert_array_equal(judge(noise), DigitsJudge(train.pictures, train.labels)(noise))


def test_no_pictures_give_no_labels(judge):
    assert judge(np.empty((0, 8, 8), dtype=np.uint8)).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 8), (2, 16, 16)])
def test_other_forms_are_refused(judge, shape):
    with pytest.raises(ValueError, match=r"uint8 \[N, 8, 8\]"):
        judge(np.zeros(shape, dtype=np.uint8))


def test_other_dtypes_are_refused(judge):
    with pytest.raises(ValueError, match="float64"):
        judge(np.zeros((2, 8, 8)))
