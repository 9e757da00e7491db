"""Scores of captions: CIDEr-D, BLEU-1 to 4 and ROUGE-L, as the COCO caption evaluation computes them.

Every function takes tokenised texts (see `tokenised` and `ptb.ptb_tokens`): one candidate and at least one reference
per picture, tokens separated by single spaces.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from dreamllm.evaluation.metrics.ptb import ptb_tokens

try:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
except ImportError:  # comes with the extra `eval`
    PTBTokenizer = None

Tokenizer = Literal["own", "stanford"]
Ngram = tuple[str, ...]
N = 4
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0
ROUGE_BETA = 1.2
_TINY, _SMALL = 1e-15, 1e-9  # added to BLEU's numerators and denominators by the published program


@dataclass(frozen=True)
class CaptionScores:
    """The mean over all pictures (`corpus`) and the score of each picture, in order."""

    corpus: float
    each: tuple[float, ...]


def tokenised(texts: Sequence[str], tokenizer: Tokenizer = "own") -> list[str]:
    """Texts -> PTB tokens, lower-cased, without punctuation, joined by spaces.

    "own" is `ptb_tokens`; "stanford" runs the Java program of the published evaluation (extra `eval` and Java). Raises
    `ImportError` or `FileNotFoundError` when that is not installed.
    """
    if tokenizer == "own":
        return [ptb_tokens(text) for text in texts]
    if PTBTokenizer is None:
        raise ImportError("the Stanford tokenizer comes with pycocoevalcap; install it, or use the tokenizer 'own'")
    if shutil.which("java") is None:
        raise FileNotFoundError("the Stanford tokenizer needs the program java; install it, or use the tokenizer 'own'")
    lines = {i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)}
    tokens = PTBTokenizer().tokenize(lines)
    return [tokens[i][0] for i in range(len(texts))]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """CIDEr-D (Vedantam et al. 2015, section 3.1), n-grams of 1 to 4 words, times 10 as published.

    Document frequencies come from `references` themselves, one document per picture. As in the published program the
    length penalty compares numbers of bigrams. Raises `ValueError` for another number of candidates than of pictures
    and for a picture without references.
    """
    check_captions(candidates, references)
    counted = [[_ngrams(reference.split()) for reference in group] for group in references]
    frequency = Counter(chain.from_iterable(set(chain.from_iterable(group)) for group in counted))
    log_pictures = math.log(len(references)) if references else 0.0

    def vector(counts: Counter[Ngram]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(N)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (log_pictures - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(w * w for w in group.values())) for group in weights]
        return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))

    scores = []
    for candidate, group in zip(candidates, counted, strict=True):
        given = vector(_ngrams(candidate.split()))
        similarity = math.fsum(_similarity(given, vector(reference)) for reference in group)
        scores.append(CIDER_SCALE * similarity / len(group))
    return _mean(scores)


@dataclass(frozen=True)
class _Vector:
    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def _similarity(given: _Vector, reference: _Vector) -> float:
    penalty = math.exp(-((given.length - reference.length) ** 2) / (2 * CIDER_SIGMA**2))
    total = 0.0
    for mine, theirs, norm, other in zip(given.weights, reference.weights, given.norms, reference.norms, strict=True):
        if norm and other:
            product = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs
            )
            total += product / (norm * other)
    return penalty * total / N


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[CaptionScores, ...]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002); `corpus` is from pooled counts, the closest reference length counts.

    Raises as `cider_d`.
    """
    check_captions(candidates, references)
    pooled = _BleuCounts([0] * N, [0] * N, 0, 0)
    each = []
    for candidate, group in zip(candidates, references, strict=True):
        counts = _bleu_counts(candidate.split(), [reference.split() for reference in group])
        pooled = pooled + counts
        each.append(counts.scores())
    corpus = pooled.scores() if each else [0.0] * N
    return tuple(CaptionScores(corpus[n], tuple(scores[n] for scores in each)) for n in range(N))


@dataclass(frozen=True)
class _BleuCounts:
    correct: list[int]
    guessed: list[int]
    length: int
    reference_length: int

    def __add__(self, other: _BleuCounts) -> _BleuCounts:
        correct = [a + b for a, b in zip(self.correct, other.correct, strict=True)]
        guessed = [a + b for a, b in zip(self.guessed, other.guessed, strict=True)]
        lengths = self.length + other.length, self.reference_length + other.reference_length
        return _BleuCounts(correct, guessed, *lengths)

    def scores(self) -> list[float]:
        ratio = (self.length + _TINY) / (self.reference_length + _SMALL)
        # Below exp(-700) nothing is left of a score, and far below it exp(1 - 1 / ratio) has no argument.
        brevity = math.exp(max(1 - 1 / ratio, -700.0)) if ratio < 1 else 1.0
        product, scores = 1.0, []
        for n, (correct, guessed) in enumerate(zip(self.correct, self.guessed, strict=True), start=1):
            product *= (correct + _TINY) / (guessed + _SMALL)
            scores.append(product ** (1 / n) * brevity)
        return scores


def _bleu_counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> _BleuCounts:
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    correct = [0] * N
    for ngram, count in _ngrams(candidate).items():
        correct[len(ngram) - 1] += min(count, most[ngram])
    guessed = [max(0, len(candidate) - n) for n in range(N)]
    closest = min(map(len, references), key=lambda length: (abs(length - len(candidate)), length))
    return _BleuCounts(correct, guessed, len(candidate), closest)


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """ROUGE-L (Lin 2004) with beta 1.2; recall and precision are each the best over the references.

    Raises as `cider_d`.
    """
    check_captions(candidates, references)
    return _mean([_rouge(c, group) for c, group in zip(candidates, references, strict=True)])


def _rouge(candidate: str, references: Sequence[str]) -> float:
    words = candidate.split(" ")
    precision = recall = 0.0
    for reference in references:
        theirs = reference.split(" ")
        common = common_length(words, theirs)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(theirs))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    # Bit-parallel (Hyyrö 2004): bit i of `row` is 0 where the length grows at b[i].
    places: dict[str, int] = {}
    for i, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << i
    everything = (1 << len(b)) - 1
    row = everything
    for word in a:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everything
    return len(b) - row.bit_count()


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def check_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises `ValueError` unless there is one candidate and at least one reference for each picture."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates were given for {len(references)} pictures")
    empty = next((i for i, group in enumerate(references) if not group), None)
    if empty is not None:
        raise ValueError(f"picture {empty} has no reference; every picture needs at least one")


def _mean(scores: Sequence[float]) -> CaptionScores:
    return CaptionScores(math.fsum(scores) / len(scores) if scores else 0.0, tuple(scores))
