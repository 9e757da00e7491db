"""Caption scores: by definition, by published and hand-computed cases, and against pycocoevalcap where installed."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamllm.evaluation.metrics import bleu, cider_d, rouge_l
from dreamllm.evaluation.metrics.captions import common_length

WORDS = (
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "cat",
    "red",
    "big",
    "on",
    "of",
    "with",
    "riding",
    "street",
    "beach",
    "table",
)


def captions(seed, pictures=40):
    """Random candidates and one to five references each; candidates are disturbed references."""
    rng = random.Random(seed)
    references = [
        [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(rng.randint(1, 5))] for _ in range(pictures)
    ]
    candidates = []
    for group in references:
        words = rng.choice(group).split()
        for _ in range(rng.randint(0, 3)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        candidates.append(" ".join(words[: rng.randint(0, len(words))] + rng.choices(WORDS, k=rng.randint(0, 2))))
    return candidates, references


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def dense_cider(candidates, references):
    """CIDEr-D from its formula with dense vectors, nothing shared with the program."""
    texts = [*candidates, *(reference for group in references for reference in group)]
    return sum(dense_cider_of(n, candidates, references, texts) for n in range(1, 5))


def dense_cider_of(n, candidates, references, texts):
    vocabulary = sorted({g for text in texts for g in grams(text, n)})
    frequency = np.array([sum(any(g in grams(r, n) for r in group) for group in references) for g in vocabulary])
    idf = np.log(len(references)) - np.log(np.maximum(1, frequency))
    scores = np.zeros(len(candidates))
    for i, (candidate, group) in enumerate(zip(candidates, references, strict=True)):
        for reference in group:
            c, r = (idf * [grams(text, n)[g] for g in vocabulary] for text in (candidate, reference))
            norm = np.linalg.norm(c) * np.linalg.norm(r)
            delta = sum(grams(candidate, 2).values()) - sum(grams(reference, 2).values())
            if norm:
                scores[i] += 10 / 4 / len(group) * np.minimum(c, r) @ r / norm * math.exp(-(delta**2) / 72)
    return scores


@pytest.mark.parametrize("seed", [0, 1])
def test_cider_is_its_formula(seed):
    candidates, references = captions(seed, 12)
    ours = cider_d(candidates, references)
    np.testing.assert_allclose(ours.each, dense_cider(candidates, references), rtol=0, atol=1e-10)
    assert ours.corpus == pytest.approx(np.mean(ours.each))


def test_cider_of_perfect_captions_is_ten():
    texts = ["a red dog runs far away", "the small cat sleeps on sofas", "two men ride green bikes today"]
    assert cider_d(texts, [[t] for t in texts]).each == pytest.approx((10, 10, 10))


def test_cider_of_one_picture_is_zero():
    """Every n-gram is then in every document."""
    assert cider_d(["a red dog runs"], [["a red dog runs"]]).corpus == 0


def test_bleu_of_the_paper():
    """Papineni et al. 2002, example 1: modified precisions 17/18 and 10/17 of candidate 1, 8/14 and 1/13 of 2."""
    references = [
        "it is a guide to action that ensures that the military will forever heed party commands",
        "it is the guiding principle which guarantees the military forces always being under the command of the party",
        "it is the practical guide for the army always to heed the directions of the party",
    ]
    one = "it is a guide to action which ensures that the military always obeys the commands of the party"
    two = "it is to insure the troops forever hearing the activity guidebook that party direct"
    first = bleu([one], [references])
    assert first[0].corpus == pytest.approx(17 / 18)
    assert first[1].corpus == pytest.approx(math.sqrt(17 / 18 * 10 / 17))
    second = bleu([two], [references])
    brevity = math.exp(1 - 16 / 14)
    assert second[0].corpus == pytest.approx(8 / 14 * brevity)
    assert second[1].corpus == pytest.approx(math.sqrt(8 / 14 * 1 / 13) * brevity)


def test_bleu_clips_repeated_words():
    """Papineni et al. 2002, example 2: "the" seven times has precision 2/7."""
    (score, *_) = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert score.corpus == pytest.approx(2 / 7)


def test_bleu_pools_counts_over_the_corpus():
    scores = bleu(["a b", "c"], [["a b"], ["d"]])
    assert scores[0].corpus == pytest.approx(2 / 3)
    assert scores[0].each == pytest.approx((1, 0), abs=1e-5)


def test_rouge_of_the_paper():
    """Lin 2004, section 3.1: against "police killed the gunman" the longest common subsequences are 3 and 2."""
    references = [["police killed the gunman"]] * 2
    scores = rouge_l(["police kill the gunman", "the gunman kill police"], references)
    assert scores.each == pytest.approx((0.75, 0.5))


def test_rouge_takes_the_best_precision_and_the_best_recall():
    (score,) = rouge_l(["a b c d"], [["a b", "a x b c y z"]]).each
    precision, recall = 3 / 4, 1.0
    assert score == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
def test_common_length_is_that_of_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    assert common_length(a, b) == table[-1][-1]


@pytest.mark.parametrize("metric", [cider_d, bleu, rouge_l])
def test_what_does_not_belong_together_is_refused(metric):
    with pytest.raises(ValueError, match="1 candidates were given for 2 pictures"):
        metric(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="picture 1 has no reference"):
        metric(["a", "b"], [["a"], []])


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_pycocoevalcap(seed):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = captions(seed, 200)
    cider, blue, rouge = CiderScorer(), BleuScorer(n=4), Rouge()
    for candidate, group in zip(candidates, references, strict=True):
        cider += (candidate, group)
        blue += (candidate, group)
    theirs, each = cider.compute_score()
    ours = cider_d(candidates, references)
    assert ours.corpus == pytest.approx(theirs, abs=1e-9)
    np.testing.assert_allclose(ours.each, each, atol=1e-9)
    theirs, each = blue.compute_score(option="closest")
    for n, score in enumerate(bleu(candidates, references)):
        assert score.corpus == pytest.approx(theirs[n], abs=1e-9)
        np.testing.assert_allclose(score.each, each[n], atol=1e-9)
    each = [rouge.calc_score([c], group) for c, group in zip(candidates, references, strict=True)]
    np.testing.assert_allclose(rouge_l(candidates, references).each, each, atol=1e-9)
