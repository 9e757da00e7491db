"""VQA accuracy: answers against those of ten people (Antol et al. 2015), normalised as by the EvalAI server."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANSWERS_PER_QUESTION = 10
AGREEING = 3
"""An answer counts fully when this many other people gave it."""

NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_->@`,?!<'
MOST_PERIODS = 32
"""The server's normaliser removes this many full stops of an answer and leaves the rest."""

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def _spellings() -> dict[str, str]:
    """Each contraction with any one apostrophe missing -> the contraction."""
    found = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, c in enumerate(word) if c == "'"}
    return found | {"somebody'd": "somebodyd"}  # the wrong way round in the published list, which is what servers use


_SPELLINGS = _spellings()


def normalise_answer(text: str) -> str:
    """The form in which answers are compared.

    Lower case; without commas, question marks, articles and full stops (but for those before digits); number words up
    to ten as digits; apostrophes restored in contractions that lack one. A punctuation mark is removed where it stands
    beside a space anywhere in the answer (or where digits are grouped by commas), and becomes a space otherwise.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    grouped = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or grouped else " ")
    return _PERIOD.sub("", result, count=MOST_PERIODS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The share of agreement in [0, 1]: over every choice of nine of the ten `answers`, mean of min(1, matches / 3).

    Prediction and answers are normalised. Raises `ValueError` for another number of answers than ten.
    """
    if len(answers) != ANSWERS_PER_QUESTION:
        raise ValueError(f"VQA accuracy needs {ANSWERS_PER_QUESTION} answers to each question, not {len(answers)}")
    given = normalise_answer(prediction)
    matches = [normalise_answer(answer) == given for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / AGREEING) for match in matches) / len(matches)
