"""No prediction crashes a metric, and every score stays in its range."""

import math
import random

import pytest

from dreamllm.evaluation.metrics import (
    anls,
    bleu,
    cider_d,
    match_numbered,
    match_option,
    normalise_answer,
    ptb_tokens,
    read_yes_no,
    rouge_l,
    vqa_accuracy,
)

ALPHABETS = {
    "punctuation": ".,;:!?'\"`()[]{}-\u2013\u2014/\\|_@#$%^&*+=<>~",
    "spaces": " \t\n\r\u00a0\u200b\u3000\u2028",
    "non-latin": "日本語テストприветमनμالسلامשלום",
    "controls": "\x00\x01\x1b\x7f\ufffe\ufeff\u202e",
    "astral": "\U0001f600\U0001f468\u200d\U0001f469\U00010348",
    "surrogates": "\ud800\udfff",
    "numbers": "0123456789.,/-:½⅓٣²",
    "mixed": "aA the'n't s. 1,0/2-日😀!?\n",
}


def predictions(count=5000):
    rng = random.Random(0)
    for i in range(count):
        alphabet = rng.choice(list(ALPHABETS.values()))
        length = 20_000 if i % 1000 == 999 else rng.choice([0, 1, 2, 5, 20, 60])
        yield "".join(rng.choices(alphabet, k=length))


@pytest.fixture(scope="module")
def texts():
    return list(predictions())


def test_caption_metrics(texts):
    tokens = [ptb_tokens(text) for text in texts]
    references = [["a red dog runs", "the dog"]] * (len(texts) - 2) + [[""], ["日本 語"]]
    scores = [cider_d(tokens, references), *bleu(tokens, references), rouge_l(tokens, references)]
    for score, most in zip(scores, [10, 1, 1, 1, 1, 1], strict=True):
        assert all(math.isfinite(s) and 0 <= s <= most + 1e-6 for s in [score.corpus, *score.each])


def test_pathological_references(texts):
    short = [text for text in texts if len(text) <= 60][:500]
    tokens = [ptb_tokens(text) for text in short]
    for scores in (cider_d(tokens, [[t] for t in tokens[::-1]]), rouge_l(tokens, [[t] for t in tokens[::-1]])):
        assert all(math.isfinite(s) for s in scores.each)


def test_answer_metrics(texts):
    answers = [["yes"] * 4 + ["a red dog", "2", "日本", "", "...", "no"]] * len(texts)
    for text, group in zip(texts, answers, strict=True):
        assert 0 <= vqa_accuracy(text, group) <= 1
        assert 0 <= anls(text, group) <= 1
        assert normalise_answer(normalise_answer(text)) is not None
        assert read_yes_no(text) in ("yes", "no")
        for match in (match_option, match_numbered):
            assert match(text, {"A": "cat", "B": "日本"}) in (None, *"ABCDE")
