"""Yes-no and single-choice answers: rules by hand, and random answers against lmms-eval where installed."""

import random
import string

import pytest

from dreamllm.evaluation.metrics import grouped_accuracy, match_numbered, match_option, read_yes_no, yes_no_scores
from dreamllm.evaluation.metrics.choices import mmbench_question
from tests.evaluation.metrics.oracles import functions_of

OPTIONS = {"A": "a cat", "B": "two dogs", "C": "bird"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No, there is no dog.", "no"),
        ("There is not a dog", "no"),
        ("There is a dog. No cat.", "yes"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
        ("the answer is no", "no"),
        ("no,", "no"),
    ],
)
def test_yes_and_no_are_read_as_published(text, answer):
    assert read_yes_no(text) == answer


def test_yes_no_scores_by_hand():
    scores = yes_no_scores(["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"])
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1, scores.yes_ratio) == pytest.approx(
        (3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5)
    )


@pytest.mark.parametrize(("said", "precision"), [("no", 0), ("yes", 0.5)])
def test_one_sided_answers_have_scores(said, precision):
    assert yes_no_scores([said] * 2, ["yes", "no"]).precision == precision
    assert yes_no_scores([], []).f1 == 0


def test_other_labels_are_refused():
    with pytest.raises(ValueError, match="must be 'yes' or 'no', not 'maybe'"):
        yes_no_scores(["yes"], ["maybe"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("The answer is B", "B"),
        ("A", "A"),
        ("A dog and two cats", None),
        ("A. cat", "A"),
        ("A or B", None),
        ("I see TWO DOGS here", "B"),
        ("a cat and a bird", None),
        ("", None),
        ("D", "D"),
    ],
)
def test_options_are_matched_by_letter_then_by_text(text, letter):
    assert match_option(text, OPTIONS) == letter


@pytest.mark.parametrize(("text", "letter"), [("(1)", "B"), ("1. two dogs", "B"), ("(7)", None), ("(0) or (1)", None)])
def test_numbered_options(text, letter):
    assert match_numbered(text, OPTIONS) == letter


def test_a_circular_question_is_right_when_all_its_rotations_are():
    indices = [5, 1_000_005, 2_000_005, 6, 1_000_006]
    groups = [mmbench_question(i) for i in indices]
    assert grouped_accuracy([True, True, True, True, False], groups) == 0.5
    assert grouped_accuracy([], []) == 0


def test_matching_is_that_of_lmms_eval():
    class Quiet:
        info = staticmethod(lambda _: None)

    space = functions_of(
        "lmms_eval", "tasks/mmbench/mmbench_evals.py", "MMBench_Evaluator", string=string, eval_logger=Quiet,
        os=__import__("os"),
    )  # fmt: skip
    theirs = space["MMBench_Evaluator"]()
    rng = random.Random(0)
    pieces = [*"ABCDEab", "A.", "(B)", "C)", "D:", ":A", "(C).", "A cat", "two", "dogs", "bird", "the", "answer", "is"]
    for _ in range(5000):
        answer = " ".join(rng.choices(pieces, k=rng.randint(0, 6)))
        assert match_option(answer, OPTIONS) == (theirs.can_infer(answer, dict(OPTIONS)) or None), answer


def test_yes_no_scores_are_those_of_lmms_eval():
    names = ("accuracy", "precision", "recall", "f1_score")
    space = functions_of("lmms_eval", "tasks/pope/utils.py", *(f"pope_aggregate_{n}" for n in names))
    rng = random.Random(0)
    for count in (1, 2, 10, 500):
        said, true = (rng.choices(["yes", "no"], k=count) for _ in range(2))
        results = [
            {"prediction": p, "ground_truth": t, "score": float(p == t)} for p, t in zip(said, true, strict=True)
        ]
        ours = yes_no_scores(said, true)
        for name in names:
            assert getattr(ours, name.removesuffix("_score")) == pytest.approx(space[f"pope_aggregate_{name}"](results))
