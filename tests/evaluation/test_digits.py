"""The evaluation of digits models, scored on scripted answers, and run on a random model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dreamllm.documents import Document, End, Picture, Text
from dreamllm.evaluation import DigitsOptions, DigitsSamples, evaluate_digits
from dreamllm.evaluation import digits as module
from dreamllm.evaluation.digits import WORDS, caption_of, names_only
from dreamllm.inference import Answer, Assistant, DrawingOptions, Engine
from tests.tiny import tiny_model

DRAWING = DrawingOptions(steps=2, guidance_scale=2.0, scheduler="ddim")
OPTIONS = DigitsOptions(created_per_digit=2, counting_documents=16, drawing=DRAWING, max_new_tokens=3)


def scan(number, extra=0):
    """A picture that only the judge below can read: its first pixel is ten times the number."""
    pixels = np.full((8, 8), extra, np.uint8)
    pixels[0, 0] = 10 * number
    return pixels


def read(pictures):
    return pictures[:, 0, 0] // 10


def created(number):
    return Picture(Image.fromarray(scan(number)), comprehension=True, creation=True)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    return Assistant(Engine(*tiny_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def data():
    labels = np.arange(30) % 10
    return np.stack([scan(number, i) for i, number in enumerate(labels)]), labels


def scripted(answer):
    """Replaces the engine: `answer(prompt, options)` gives the parts of each answer."""

    class Scripted(Engine):
        def answers(self, prompts, options=None, seeds=None, progress=None):
            return [Answer(Document(tuple(answer(prompt, options))), (), "end") for prompt in prompts]

    return Scripted


def shown(prompt):
    """The numbers on a prompt's pictures."""
    return [int(read(part.source[None])[0]) for part in prompt.pictures()]


def perfect(prompt, options):
    numbers = shown(prompt)
    if len(numbers) == 2:
        return [Text(WORDS[numbers[1] + 1]), created(numbers[1] + 1), End()]
    if numbers:
        return [Text(f"a {WORDS[numbers[0]]}"), End()]
    if options.pictures == "force":
        return [created(WORDS.index(prompt.text().split()[-1]))]
    return [Text("two"), created(2), End()]


def run(monkeypatch, assistant, data, answer, options=OPTIONS, judge=read):
    monkeypatch.setattr(module, "Engine", scripted(answer))
    return evaluate_digits(assistant, *data, judge, options).results


def test_a_perfect_model_gets_everything(monkeypatch, assistant, data):
    results = run(monkeypatch, assistant, data, perfect)
    for name, total in {"captions": 30, "judge": 30, "creation": 20, "counting": 16, "counting_drawn": 16}.items():
        assert (getattr(results, name).right, getattr(results, name).total) == (total, total)


def test_each_part_of_counting_is_scored_for_itself(monkeypatch, assistant, data):
    """Of eight kinds of answer (two each), only the right word, a picture and the right digit together count."""

    def answer(prompt, options):
        numbers = shown(prompt)
        if len(numbers) != 2:
            return perfect(prompt, options)
        first, following = numbers[0], numbers[1] + 1
        word, digit = Text(WORDS[following]), created(following)
        wrong_word, wrong_digit = Text(WORDS[following - 1]), created(following - 1)
        return [
            [word, digit],
            [word, wrong_digit],
            [wrong_word, digit],
            [word],
            [digit],
            [],
            [Text(f"{WORDS[following]} {WORDS[0]}"), digit],
            [word, digit, Text("and so on")],
        ][first]

    results = run(monkeypatch, assistant, data, answer)
    assert results.counting.right == 2 * 2
    assert results.counting_word.right == 2 * 4
    assert results.counting_dreamed.right == 2 * 6
    assert results.counting_drawn.right == 2 * 5
    assert results.counting_drawn.total == 16


def test_captions_and_creations_are_scored(monkeypatch, assistant, data):
    def answer(prompt, options):
        numbers = shown(prompt)
        if len(numbers) == 1 and numbers[0] == 3:
            return [Text("an eight")]
        if options.pictures == "force" and prompt.text() == "a five":
            return [created(6)]
        return perfect(prompt, options)

    results = run(monkeypatch, assistant, data, answer)
    assert results.captions.right == 27
    assert results.creation.right == 18


def test_the_judge_is_judged_on_the_real_scans(monkeypatch, assistant, data):
    results = run(monkeypatch, assistant, data, perfect, judge=lambda pictures: np.minimum(read(pictures), 8))
    assert results.judge.right == 27


def prompts_of(monkeypatch, assistant, data, options):
    seen = []

    def answer(prompt, generation):
        seen.append((prompt, generation))
        return perfect(prompt, generation)

    run(monkeypatch, assistant, data, answer, options)
    return seen


@pytest.mark.parametrize("given", ["read", "created"])
def test_counting_prompts_show_unseen_pictures_of_two_consecutive_digits(monkeypatch, assistant, data, given):
    seen = prompts_of(monkeypatch, assistant, data, replace(OPTIONS, counting_pictures=given))
    counting = [prompt for prompt, _ in seen if len(prompt.pictures()) == 2]
    assert [shown(prompt) for prompt in counting] == [[i % 8, i % 8 + 1] for i in range(16)]
    for prompt in counting:
        word, first, second_word, second = prompt.parts
        assert [word.text, second_word.text] == [WORDS[n] for n in shown(prompt)]
        assert all(p.comprehension and p.creation == (given == "created") for p in (first, second))
        assert all(any(np.array_equal(p.source, scan) for scan in data[0]) for p in (first, second))


def test_counting_prompts_may_hold_pictures_alone(monkeypatch, assistant, data):
    seen = prompts_of(monkeypatch, assistant, data, replace(OPTIONS, counting_text=""))
    assert all(len(prompt.parts) == 2 for prompt, _ in seen if len(prompt.pictures()) == 2)


def test_creation_prompts_take_the_captions_in_turn(monkeypatch, assistant, data):
    options = replace(OPTIONS, captions=("{article} {word}", "the digit {word}"))
    seen = prompts_of(monkeypatch, assistant, data, options)
    texts = [prompt.text() for prompt, generation in seen if generation.pictures == "force"]
    assert texts[:2] == ["a zero", "the digit zero"]
    assert texts[16:18] == ["an eight", "the digit eight"]


@pytest.mark.parametrize(
    ("text", "number", "right"),
    [
        ("seven", 7, True),
        ("This is a Seven.", 7, True),
        ("seven, certainly seven", 7, True),
        ("seven or one", 7, False),
        ("seventy", 7, False),
        ("", 0, False),
    ],
)
def test_naming_a_number(text, number, right):
    assert names_only(text, number) == right


def test_articles():
    assert [caption_of("{article} {word}", n) for n in (7, 8)] == ["a seven", "an eight"]


# -- on a random model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(assistant, data):
    return evaluate_digits(assistant, *data, read, replace(OPTIONS, instructions=("Count", "Draw")))


def test_a_random_model_is_evaluated_to_the_end(evaluation):
    samples = evaluation.samples
    assert samples.created.shape == (20, 8, 8)
    assert samples.created.dtype == np.uint8
    assert samples.attention_pictures.shape == (10, 8, 8)
    assert samples.attention_maps.shape == (10, 4, 8, 8)
    assert len(samples.documents) == 2
    assert len(samples.captions) == 30


def test_the_same_seed_gives_the_same_results(evaluation, assistant, data):
    options = replace(OPTIONS, instructions=("Count", "Draw"))
    again = evaluate_digits(assistant, *data, read, options)
    assert replace(again.results, seconds=0) == replace(evaluation.results, seconds=0)
    assert np.array_equal(again.samples.created, evaluation.samples.created)
    other_batches = evaluate_digits(assistant, *data, read, replace(options, batch_size=7))
    assert list(other_batches.samples.captions) == list(evaluation.samples.captions)


def test_results_are_json_with_targets(evaluation, tmp_path):
    evaluation.save(tmp_path / "evaluation")
    values = json.loads((tmp_path / "evaluation" / "digits.json").read_text())
    assert values["captions"]["target"] == 0.93
    assert values["creation"]["target"] == 0.88
    assert values["counting"]["target"] == 0.80
    assert values["captions"]["reached"] == (values["captions"]["share"] >= 0.93)
    assert values["judge"]["right"] == 30
    assert not list((tmp_path / "evaluation").glob("*.partial"))


def test_samples_come_back_as_they_were(evaluation, tmp_path):
    evaluation.save(tmp_path)
    loaded = DigitsSamples.load(tmp_path / "digits.npz")
    for name in ("pictures", "labels", "created", "wanted", "judged", "attention_pictures", "attention_maps"):
        assert np.array_equal(getattr(loaded, name), getattr(evaluation.samples, name))
    assert loaded.captions == evaluation.samples.captions
    for ours, theirs in zip(loaded.documents, evaluation.samples.documents, strict=True):
        assert ours.text() == theirs.text()
        for a, b in zip(ours.pictures(), theirs.pictures(), strict=True):
            assert np.array_equal(a.source, np.asarray(b.source))


def test_documents_with_pictures_come_back(tmp_path, evaluation):
    document = Document((Text("two"), created(2), Text("three"), created(3), End()))
    replace(evaluation.samples, documents=[document], instructions=["Count"]).save(tmp_path / "s.npz")
    (loaded,) = DigitsSamples.load(tmp_path / "s.npz").documents
    assert [part.text if isinstance(part, Text) else int(read(part.source[None])[0]) for part in loaded.parts] == [
        "two",
        2,
        "three",
        3,
    ]


def test_the_bar_is_quiet_where_there_is_no_terminal(assistant, data, tmp_path):
    with open(tmp_path / "out", "w") as file:
        evaluate_digits(assistant, *data, read, OPTIONS, Console(file=file))
    assert (tmp_path / "out").read_text() == ""


def test_results_print_as_lines(evaluation):
    assert str(evaluation.results).splitlines()[2].startswith("judge")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"created_per_digit": 0}, "created_per_digit must be at least 1"),
        ({"captions": ("a digit",)}, "the prompt 'a digit' must contain {word}"),
        ({"captions": ()}, "captions must hold at least one"),
        ({"counting_pictures": "seen"}, "counting_pictures must be 'read' or 'created'"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DigitsOptions(**wrong)


def test_other_data_are_refused(assistant, data):
    pictures, labels = data
    with pytest.raises(ValueError, match=r"pictures must be uint8 \[N, 8, 8\], not float64"):
        evaluate_digits(assistant, pictures / 255, labels, read, OPTIONS)
    with pytest.raises(ValueError, match="every number from 0 to 9 at least once"):
        evaluate_digits(assistant, pictures[:5], labels[:5], read, OPTIONS)


def test_a_model_of_other_pictures_is_refused(tmp_path, data):
    other = Assistant(Engine(*tiny_model(tmp_path, vae=True)))
    with pytest.raises(ValueError, match="a digits model draws 8-pixel pictures of 1 channel"):
        evaluate_digits(other, *data, read, OPTIONS)


def test_the_model_is_left_in_its_mode(assistant, data):
    torch.manual_seed(0)
    assistant.engine.model.train()
    evaluate_digits(assistant, *data, read, OPTIONS)
    assert assistant.engine.model.training
    assistant.engine.model.eval()
