"""Average normalised Levenshtein similarity, the metric of the document benchmarks (Biten et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str], threshold: float = THRESHOLD) -> float:
    """The best similarity to any of `answers`: 1 - edit distance / longer length, 0 where that is below `threshold`.

    Compared in lower case with runs of white space as one space. Raises `ValueError` without answers.
    """
    if not answers:
        raise ValueError("ANLS needs at least one answer")
    given = _normalised(prediction)
    best = max(_similarity(given, _normalised(answer), threshold) for answer in answers)
    return best if best >= threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of one character."""
    # Bit-parallel (Myers 1999, in Hyyrö's form): bit i of `up` and `down` says whether the distance to the first i + 1
    # characters of `b` is one more or one less than to the first i.
    if not b:
        return len(a)
    places: dict[str, int] = {}
    for i, character in enumerate(b):
        places[character] = places.get(character, 0) | 1 << i
    everything, last = (1 << len(b)) - 1, 1 << (len(b) - 1)
    up, down, distance = everything, 0, len(b)
    for character in a:
        equal = places.get(character, 0)
        diagonal = ((equal & up) + up ^ up) | equal | down
        right_up = down | ~(diagonal | up) & everything
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & everything
        right_down = right_down << 1 & everything
        up = right_down | ~(diagonal | right_up) & everything
        down = right_up & diagonal
    return distance


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(given: str, answer: str, threshold: float) -> float:
    longest = max(len(given), len(answer))
    if longest == 0:
        return 1.0
    if 1 - abs(len(given) - len(answer)) / longest < threshold:
        return 0.0  # the difference in length alone is too large
    return 1 - edit_distance(given, answer) / longest
