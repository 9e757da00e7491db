"""Scanned digits and all that is written about them. Functions are pure; chance comes from a given generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from dreamllm.evaluation.digits import WORDS, caption_of

CAPTIONS = (
    "{article} {word}",
    "a picture of {article} {word}",
    "a scan of {article} {word}",
    "the digit {word}",
    "a handwritten {word}",
    "this is {article} {word}",
)

READING = (
    ("What is this?", "This is {article} {word}."),
    ("Which digit is this?", "This is the digit {word}."),
    ("What do you see?", "I see {article} {word}."),
    ("What digit is in the picture?", "It is {article} {word}."),
)
"""Questions about a picture, each with its answer: which answer is right must not be a matter of chance."""

DRAWING = ("Draw {article} {word}.", "Please draw {article} {word}.", "Show me {article} {word}.")
DRAWN = "Here is {article} {word}."

COUNTING = "Count from {first} to {last} with pictures."
NEXT = ("What comes next?", "Which digit comes next?")

SMALL_TALK = (
    ("Hello.", "Hello. I can read, draw and count digits."),
    ("Who are you?", "I am a small model. I can read, draw and count digits."),
    ("Thank you.", "You are welcome."),
)

FILLERS = {"dots": ".", "stars": "*", "lines": "-"}
"""What stands between the words when text counts with something in between, as pictures will later."""


def caption(number: int, rng: random.Random) -> str:
    """One of the captions of `number`."""
    return caption_of(rng.choice(CAPTIONS), number)


def reading_turn(number: int, rng: random.Random) -> tuple[str, str]:
    """A question about a picture of `number` (the picture itself is not in the text) and its answer."""
    question, answer = rng.choice(READING)
    return question, caption_of(answer, number)


def drawing_turn(number: int, rng: random.Random) -> tuple[str, str]:
    """A request to draw `number`, and the answer before the picture."""
    return caption_of(rng.choice(DRAWING), number), caption_of(DRAWN, number)


def counting_request(first: int, last: int) -> str:
    """The instruction to count with pictures."""
    return COUNTING.format(first=WORDS[first], last=WORDS[last])


@dataclass(frozen=True)
class CountingRun:
    """What a counting document shows: `numbers` in order.

    The first `given` of them are pictures to look at, with their words only if `named`; each of the others is a word
    and a picture to create. A document of the ordinary kind has `given` = 0.
    """

    numbers: range
    given: int = 0
    named: bool = True


def counting_run(rng: random.Random, given_share: float = 0.5, named_share: float = 0.3) -> CountingRun:
    """A random run of two to four consecutive digits.

    `given_share` of the runs begin with two given pictures, so that the words that follow can only be told by looking;
    `named_share` of those have words beside them. Runs of two are half as frequent as longer ones: after two pictures
    it must be likelier that counting goes on than that it ends.
    """
    given = 2 if rng.random() < given_share else 0
    length = rng.choice((3, 4)) if given else rng.choice((2, 3, 3, 4, 4))
    first = rng.randrange(len(WORDS) + 1 - length)
    named = not given or rng.random() < named_share
    return CountingRun(range(first, first + length), given, named)


Dialogue = Callable[[str, str], str]
"""Renders a question and its answer, e.g. with a chat template."""


def corpus(count: int, seed: int, dialogue: Dialogue) -> list[str]:
    """`count` texts for the language model: captions, counting and dialogues; no pictures."""
    rng = random.Random(seed)
    return [_text(rng, dialogue) for _ in range(count)]


def vocabulary_texts(dialogue: Dialogue) -> list[str]:
    """Every wording that any stage uses, once, so that the tokenizer has whole words for it."""
    numbers = range(len(WORDS))
    texts = [caption_of(template, n) for template in (*CAPTIONS, *DRAWING, DRAWN) for n in numbers]
    texts += [dialogue(question, caption_of(answer, n)) for question, answer in READING for n in numbers]
    texts += [counting_request(a, b) for a in numbers for b in numbers if a < b]
    return [*texts, *(dialogue(*turn) for turn in SMALL_TALK), *NEXT]


def _text(rng: random.Random, dialogue: Dialogue) -> str:
    kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    return kind(rng, dialogue)


def _caption(rng: random.Random, dialogue: Dialogue) -> str:
    return caption(rng.randrange(10), rng)


def _echo(rng: random.Random, dialogue: Dialogue) -> str:
    """A number many times, with errors in between, then what it is: the text form of a row of patches.

    A language model that has read such lines can be told by a linear projector alone what a picture shows (without
    them stage I reached 73% instead of 96%).
    """
    number, length, errors = rng.randrange(10), rng.randint(2, 18), rng.random() * 0.5
    words = [WORDS[number]] + [
        WORDS[rng.randrange(10)] if rng.random() < errors else WORDS[number] for _ in range(length - 1)
    ]
    row = " ".join(words)
    if rng.random() < 0.6:
        return f"{row} {caption(number, rng)}"
    question, answer = reading_turn(number, rng)
    return dialogue(f"{row} {question}", answer)


def _count(rng: random.Random, dialogue: Dialogue) -> str:
    first, last = _bounds(rng)
    return " ".join(WORDS[first : last + 1])


def _spaced(rng: random.Random, dialogue: Dialogue) -> str:
    """Counting with something between the words: the text form of an interleaved document."""
    first = rng.randrange(10)
    last = rng.randrange(first, 10)
    name, sign = rng.choice(list(FILLERS.items()))
    widest = min(8, 40 // (last + 1 - first))
    usual = rng.randint(1, widest)
    gaps = [usual if rng.random() < 0.7 else rng.randint(1, widest) for _ in range(first, last + 1)]
    body = " ".join(f"{WORDS[first + i]}{f' {sign}' * gap}" for i, gap in enumerate(gaps))
    if rng.random() < 0.25:
        return body
    return dialogue(f"Count from {WORDS[first]} to {WORDS[last]} with {name}.", body)


def _counting_dialogue(rng: random.Random, dialogue: Dialogue) -> str:
    return dialogue(*_counting_turn(rng))


def _other_dialogue(rng: random.Random, dialogue: Dialogue) -> str:
    kind = rng.choice((_neighbour_turn, _reading_turn, _drawing_turn, _next_turn, _sum_turn))
    return dialogue(*(rng.choice(SMALL_TALK) if rng.random() < 0.12 else kind(rng)))


def _counting_turn(rng: random.Random) -> tuple[str, str]:
    first, last = _bounds(rng)
    return f"Count from {WORDS[first]} to {WORDS[last]}.", " ".join(WORDS[first : last + 1])


def _neighbour_turn(rng: random.Random) -> tuple[str, str]:
    low = rng.randrange(9)
    if rng.random() < 0.5:
        return f"What comes after {WORDS[low]}?", WORDS[low + 1]
    return f"What comes before {WORDS[low + 1]}?", WORDS[low]


def _reading_turn(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(10)
    question, answer = reading_turn(number, rng)
    return f"I see {caption_of('{article} {word}', number)}. {question}", answer


def _drawing_turn(rng: random.Random) -> tuple[str, str]:
    return drawing_turn(rng.randrange(10), rng)


def _next_turn(rng: random.Random) -> tuple[str, str]:
    first = rng.randrange(8)
    return f"{WORDS[first]} {WORDS[first + 1]} {rng.choice(NEXT)}", WORDS[first + 2]


def _sum_turn(rng: random.Random) -> tuple[str, str]:
    a = rng.randrange(10)
    b = rng.randrange(10 - a)
    return f"What is {WORDS[a]} plus {WORDS[b]}?", f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]}."


def _bounds(rng: random.Random) -> tuple[int, int]:
    first = rng.randrange(9)
    return first, rng.randrange(first + 1, 10)


_SHARES = {_caption: 10, _echo: 20, _count: 5, _spaced: 28, _counting_dialogue: 20, _other_dialogue: 17}
"""Percent of the corpus. The hardest thing in it is to stop counting at the number that was asked for: with half as
many counting texts the language model did so for 63% of plain requests, with these shares for all of them."""
