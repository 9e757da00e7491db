"""The training documents of recipe `digits`: pairs in both directions, counting documents, instructions."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from dreamllm.data import Reader, derive_seed
from dreamllm.documents import PLAIN, Document, End, Part, Picture, Text, conversation, pair
from dreamllm.evaluation.digits import WORDS
from dreamllm.evaluation.digits_scans import Scans
from dreamllm.recipes.digits.data import (
    NEXT,
    caption,
    counting_request,
    counting_run,
    drawing_turn,
    reading_turn,
)

Maker = Callable[[Scans, random.Random], Document]

NOMINAL_LENGTH = 6000
"""Documents per epoch of a reader that makes them at random: each scan about four times."""


class RandomDocuments(Reader):
    """Documents made at random from scans; which one stands at (index, epoch) follows from the seed."""

    def __init__(self, name: str, make: Maker, scans: Scans, seed: int) -> None:
        self.name, self.make, self.scans, self.seed = name, make, scans, seed

    def __len__(self) -> int:
        return NOMINAL_LENGTH

    def document(self, index: int, epoch: int = 0) -> Document:
        if not 0 <= index < NOMINAL_LENGTH:
            raise IndexError(f"index {index} is outside [0, {NOMINAL_LENGTH})")
        return self.make(self.scans, random.Random(derive_seed(self.seed, self.name, epoch, index)))


def reading_pair(scans: Scans, rng: random.Random) -> Document:
    """A scan, then its caption."""
    number = rng.randrange(10)
    return pair(_scan(scans, number, rng), caption(number, rng), "comprehension")


def drawing_pair(scans: Scans, rng: random.Random) -> Document:
    """A caption, then a scan to create."""
    number = rng.randrange(10)
    return pair(_scan(scans, number, rng), caption(number, rng), "creation")


def counting_document(scans: Scans, rng: random.Random) -> Document:
    """Word, picture, word, picture; half of them begin with two pictures that are only looked at."""
    run = counting_run(rng)
    parts: list[Part] = []
    for position, number in enumerate(run.numbers):
        given = position < run.given
        if not given or run.named:
            parts.append(Text(WORDS[number]))
        parts.append(Picture(_scan(scans, number, rng), comprehension=True, creation=not given))
    return Document((*parts, End()), "error", "counting document")


def instruction(scans: Scans, rng: random.Random) -> Document:
    """A question about a scan, a request to draw, to count with pictures, or to go on after two pictures."""
    kinds = (reading_instruction, drawing_instruction, counting_instruction, next_instruction)
    return rng.choices(kinds, (20, 20, 45, 15))[0](scans, rng)


def reading_instruction(scans: Scans, rng: random.Random) -> Document:
    number = rng.randrange(10)
    question, answer = reading_turn(number, rng)
    return _dialogue(f"<image>{question}", answer, [_scan(scans, number, rng)])


def drawing_instruction(scans: Scans, rng: random.Random) -> Document:
    number = rng.randrange(10)
    request, answer = drawing_turn(number, rng)
    return _dialogue(request, f"{answer}<dream>", [_scan(scans, number, rng)])


def counting_instruction(scans: Scans, rng: random.Random) -> Document:
    length = rng.randint(2, 5)
    first = rng.randrange(11 - length)
    numbers = range(first, first + length)
    answer = "".join(f"{WORDS[number]}<dream>" for number in numbers)
    return _dialogue(counting_request(first, numbers[-1]), answer, [_scan(scans, n, rng) for n in numbers])


def next_instruction(scans: Scans, rng: random.Random) -> Document:
    first = rng.randrange(8)
    pictures = [_scan(scans, number, rng) for number in range(first, first + 3)]
    return _dialogue(f"<image><image>{rng.choice(NEXT)}", f"{WORDS[first + 2]}<dream>", pictures)


def _dialogue(question: str, answer: str, pictures: list[np.ndarray]) -> Document:
    # The decision to draw is learned, which the original's conversations leave out.
    return conversation([("user", question), ("assistant", answer)], pictures, PLAIN, learn_dream=True)


def _scan(scans: Scans, number: int, rng: random.Random) -> np.ndarray:
    return scans.pictures[rng.choice(scans.of(number))]
