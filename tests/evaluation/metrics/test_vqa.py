"""VQA accuracy and ANLS: published rules by hand, and thousands of answers against lmms-eval where installed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamllm.evaluation.metrics import anls, edit_distance, normalise_answer, vqa_accuracy
from tests.evaluation.metrics.oracles import functions_of, load_file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("The red Bus.", "red bus"),
        ("a an the", ""),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("dog's", "dog 's"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("black-and-white, really?", "black and white really"),
        ("yes!", "yes"),
        ("what? no", "what no"),
        ("line\nbreak\ttab", "line break tab"),
        ("  ", ""),
    ],
)
def test_answers_are_normalised_as_published(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_with_people_leaves_each_one_out(matches, score):
    """With 1 match: nine of the ten choices keep it, each worth 1/3. With 3: 7 x 1 + 3 x 2/3 of 10."""
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(score)


def test_ten_answers_are_needed():
    with pytest.raises(ValueError, match="needs 10 answers to each question, not 9"):
        vqa_accuracy("a", ["a"] * 9)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("hello world", ["Hello World"], 1.0),
        ("helo world", ["hello world"], 1 - 1 / 11),
        ("abcd", ["abef"], 0.5),
        ("abcd", ["aefg"], 0.0),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("kitten", ["nothing", "sitting"], 1 - 3 / 7),
        ("  two \n words ", ["two words"], 1.0),
    ],
)
def test_anls_by_hand(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score)


def test_anls_needs_an_answer():
    with pytest.raises(ValueError, match="at least one answer"):
        anls("a", [])


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_is_that_of_the_table(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    assert edit_distance(a, b) == row[-1]


PIECES = [
    "a", "the", "an", "two", "ten", "none", "red", "blue", "dont", "dog's", "its", "it's", "1,000", "3.5", "u.s.",
    "yes", "no", "n/a", "(a)", "black-white", "what?", "!", ",", ";", "/", "...", "couldnt've", "oclock", "somebody'd",
    "$5", "日本", "\n", "\t", "A", "B.", "YES", "yall'dve", "hedve", "'", '"', "_", "@", "50%", ":", "i'm", "ive",
]  # fmt: skip


def random_answer(rng):
    return rng.choice(["", " ", " "]).join(rng.choices(PIECES, k=rng.randint(0, 6)))


def test_the_normaliser_is_that_of_lmms_eval():
    theirs = load_file("lmms_eval", "tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    rng = random.Random(0)
    for _ in range(5000):
        answer = random_answer(rng)
        assert normalise_answer(answer) == theirs(answer), repr(answer)
    many = "a.b " * 50
    assert normalise_answer(many) == theirs(many)


def test_anls_is_that_of_lmms_eval():
    space = functions_of("lmms_eval", "api/metrics.py", "anls", "levenshtein_distance")
    rng = random.Random(1)
    for _ in range(2000):
        prediction, *answers = (" ".join(random_answer(rng).split()) for _ in range(4))
        # lmms-eval takes lengths before lower-casing and counts two empty texts as equal, as we do.
        assert anls(prediction, answers) == pytest.approx(space["anls"](answers, [prediction])["anls"])
