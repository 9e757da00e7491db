"""How well a model reads, draws and counts scanned digits it has never seen."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dreamllm.documents import Document, Part, Picture, Text
from dreamllm.evaluation.attention import dream_attention
from dreamllm.evaluation.samples import DigitsSamples, to_uint8
from dreamllm.evaluation.statistics import Proportion
from dreamllm.inference import Answer, Assistant, DrawingOptions, Engine, GenerationOptions, drawing_defaults
from dreamllm.inference.drawing import Progress as OnStep
from dreamllm.inference.drawing import to_pil
from dreamllm.training import write_json

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TARGETS = {"captions": 0.93, "creation": 0.88, "counting": 0.80}
RESULTS_FILE, SAMPLES_FILE = "digits.json", "digits.npz"
_WORD = re.compile(r"\b(" + "|".join(WORDS) + r")\b", re.IGNORECASE)


class Judge(Protocol):
    """An independent classifier of digits, trained on real scans only."""

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, 8, 8], 0 background to 255 ink -> int labels [N]."""


@dataclass(frozen=True)
class DigitsOptions:
    """What is evaluated.

    Attributes:
        created_per_digit: digits drawn for each of the ten captions.
        counting_documents: documents that begin with two digits and are to be continued.
        captions: creation prompts, used in turn, in the form of the captions in training; {word} stands for the number
            word, {article} for its article.
        counting_text: the text before each picture of a counting document, with {word}; empty: pictures alone.
        counting_pictures: how the prompt gives its two pictures: "read" as pictures to look at, "created" with the
            dream queries before them, exactly as training documents hold them.
        instructions: requests whose answers, documents with pictures, the report shows.
        drawing: how pictures are drawn; None: as the model recommends.
        max_new_tokens: most tokens of a caption or of a counting answer.
        batch_size: prompts and pictures that advance together.
        seed: decides which pictures the counting documents show, and all noise.
    """

    created_per_digit: int = 20
    counting_documents: int = 100
    captions: Sequence[str] = ("{article} {word}",)
    counting_text: str = "{word}"
    counting_pictures: Literal["read", "created"] = "read"
    instructions: Sequence[str] = (
        "Count from two to five with pictures.",
        "Count from zero to three with pictures.",
        "Count from six to nine with pictures.",
    )
    drawing: DrawingOptions | None = None
    max_new_tokens: int = 12
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("created_per_digit", "counting_documents", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.captions:
            raise ValueError("captions must hold at least one creation prompt")
        for text in (*self.captions, *filter(None, [self.counting_text])):
            if "{word}" not in text:
                raise ValueError(f"the prompt {text!r} must contain {{word}}, where the number word stands")
        if self.counting_pictures not in ("read", "created"):
            raise ValueError(f"counting_pictures must be 'read' or 'created', not {self.counting_pictures!r}")


EVALUATION = DigitsOptions(
    captions=("{article} {word}", "a picture of {article} {word}"),
    counting_text="",  # from the pictures alone: the words beside them would give the answer away
    counting_documents=200,
)
"""How the digits model is evaluated, by its recipe and by `dreamllm evaluate digits`."""


@dataclass(frozen=True)
class DigitsResults:
    """Proportions on unseen data.

    `captions`: texts for real scans that name the right number and no other. `creation`: drawn digits that the judge
    takes for what was asked. `judge`: real scans that the judge itself classifies rightly. `counting`: documents
    continued with the right word, the dream token by the model's own choice, and the right digit; its three parts are
    counted each for itself (`counting_drawn`: of all documents; one without a picture is wrong).
    """

    captions: Proportion
    creation: Proportion
    judge: Proportion
    counting: Proportion
    counting_word: Proportion
    counting_dreamed: Proportion
    counting_drawn: Proportion
    seconds: float

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            name: value.to_json() for name, value in vars(self).items() if isinstance(value, Proportion)
        }
        for name, target in TARGETS.items():
            values[name] |= {"target": target, "reached": values[name]["share"] >= target}
        return {**values, "seconds": round(self.seconds, 2)}

    def __str__(self) -> str:
        lines = [f"{name.replace('_', ', '):18} {value}" for name, value in vars(self).items() if name != "seconds"]
        return "\n".join(lines)


@dataclass(frozen=True)
class DigitsEvaluation:
    """Results, and the samples behind them."""

    results: DigitsResults
    samples: DigitsSamples

    def save(self, folder: str | Path) -> None:
        """Writes `digits.json` and `digits.npz` into `folder`, each complete or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.samples.save(folder / SAMPLES_FILE)
        write_json(folder / RESULTS_FILE, self.results.to_json())


def evaluate_digits(
    assistant: Assistant,
    pictures: np.ndarray,
    labels: np.ndarray,
    judge: Judge,
    options: DigitsOptions | None = None,
    console: Console | None = None,
) -> DigitsEvaluation:
    """Evaluates a digits model on scans it has never seen.

    `pictures` uint8 [N, 8, 8], 0 background to 255 ink; `labels` int [N], every number at least once. A progress bar
    is shown where `console` (default: standard error) is a terminal.

    Raises `ValueError` for pictures or labels of another form, and for a model that does not draw 8-pixel grey
    pictures.
    """
    options = options or DigitsOptions()
    check_data(assistant, pictures, labels)
    start = time.perf_counter()
    drawing = options.drawing or drawing_defaults(assistant.engine.model)
    drawing = replace(drawing, batch_size=options.batch_size, candidates=1)
    engine = Engine(assistant.engine.model, assistant.engine.processor, options.batch_size)
    with Bar(console or Console(stderr=True)) as bar:
        texts = _write_captions(engine, pictures, options, bar)
        created, wanted = _draw_digits(engine, options, drawing, bar)
        judged = np.asarray(judge(created))
        answers, following = continue_counting(engine, pictures, labels, options, drawing, bar)
        documents = _follow_instructions(engine, options, drawing, bar)
        attention_pictures, attention_maps = _record_attention(engine, options, drawing, bar)
    word, dreamed, drawn = score_counting(answers, following, judge)
    results = DigitsResults(
        captions=_proportion([names_only(text, label) for text, label in zip(texts, labels, strict=True)]),
        creation=_proportion(judged == wanted),
        judge=_proportion(np.asarray(judge(pictures)) == labels),
        counting=_proportion(word & dreamed & drawn),
        counting_word=_proportion(word),
        counting_dreamed=_proportion(dreamed),
        counting_drawn=_proportion(drawn),
        seconds=time.perf_counter() - start,
    )
    samples = DigitsSamples(
        pictures, labels, texts, created, wanted, judged,
        options.instructions, documents, attention_pictures, attention_maps,
    )  # fmt: skip
    return DigitsEvaluation(results, samples)


def names_only(text: str, number: int) -> bool:
    """Whether `text` names `number` in words and no other number from zero to nine."""
    return {word.lower() for word in _WORD.findall(text)} == {WORDS[number]}


def caption_of(template: str, number: int) -> str:
    """`template` with {word} and {article} filled in."""
    word = WORDS[number]
    return template.format(word=word, article="an" if word == "eight" else "a")


def check_data(assistant: Assistant, pictures: np.ndarray, labels: np.ndarray) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 3 or pictures.shape[1:] != (8, 8):
        raise ValueError(f"pictures must be uint8 [N, 8, 8], not {pictures.dtype} {list(pictures.shape)}")
    if labels.shape != pictures.shape[:1] or set(labels.tolist()) != set(range(10)):
        raise ValueError("labels must hold one number for each picture, and every number from 0 to 9 at least once")
    config = assistant.engine.model.config
    if (config.picture_size, config.picture_channels) != (8, 1):
        raise ValueError(
            f"the model draws {config.picture_size}-pixel pictures of {config.picture_channels} channels; "
            "a digits model draws 8-pixel pictures of 1 channel"
        )


def _write_captions(engine: Engine, pictures: np.ndarray, options: DigitsOptions, bar: Bar) -> list[str]:
    bar.begin("reading unseen digits")
    written = GenerationOptions(max_new_tokens=options.max_new_tokens, pictures="forbid")
    return Assistant(engine).caption_many(list(pictures), written)


def _draw_digits(
    engine: Engine, options: DigitsOptions, drawing: DrawingOptions, bar: Bar
) -> tuple[np.ndarray, np.ndarray]:
    """Drawn digits uint8 [10 * n, 8, 8] and the numbers they should show."""
    wanted = np.repeat(np.arange(10), options.created_per_digit)
    captions = [caption_of(options.captions[i % len(options.captions)], n) for i, n in enumerate(wanted.tolist())]
    seeds = range(options.seed, options.seed + len(wanted))
    drawn = Assistant(engine).text_to_image_many(captions, seeds, drawing, bar.begin("drawing digits"))
    return to_uint8([picture for (picture,) in drawn]), wanted


def continue_counting(
    engine: Engine,
    pictures: np.ndarray,
    labels: np.ndarray,
    options: DigitsOptions,
    drawing: DrawingOptions,
    bar: Bar,
) -> tuple[list[Answer], np.ndarray]:
    """Answers to the beginnings of counting documents, and the number each should go on with."""
    rng = np.random.default_rng(options.seed)
    first = np.arange(options.counting_documents) % 8
    prompts = []
    for number in first.tolist():
        parts: list[Part] = []
        for shown in (number, number + 1):
            scan = pictures[rng.choice(np.flatnonzero(labels == shown))]
            if options.counting_text:
                parts.append(Text(caption_of(options.counting_text, shown)))
            parts.append(Picture(scan, comprehension=True, creation=options.counting_pictures == "created"))
        prompts.append(Document(tuple(parts), "error", "counting document"))
    written = GenerationOptions(
        max_new_tokens=options.max_new_tokens, max_pictures=1, seed=options.seed, drawing=drawing
    )
    return engine.answers(prompts, written, progress=bar.begin("continuing documents")), first + 2


def score_counting(
    answers: Sequence[Answer], following: np.ndarray, judge: Judge
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [N] each: the text before the picture names the number; a picture follows it; it shows the number."""
    word, dreamed, drawn = (np.zeros(len(answers), dtype=bool) for _ in range(3))
    found = []
    for i, answer in enumerate(answers):
        parts = answer.document.parts
        if parts and isinstance(parts[0], Text):
            word[i] = names_only(parts[0].text, following[i])
        first = next((k for k, part in enumerate(parts) if isinstance(part, Picture)), None)
        dreamed[i] = first is not None and first <= 1
        if dreamed[i]:
            found.append(answer.pictures[0])
    if found:
        drawn[dreamed] = np.asarray(judge(to_uint8(found))) == following[dreamed]
    return word, dreamed, drawn


def _follow_instructions(engine: Engine, options: DigitsOptions, drawing: DrawingOptions, bar: Bar) -> list[Document]:
    prompts = [engine.processor.chat([("user", text)]) for text in options.instructions]
    written = GenerationOptions(max_new_tokens=64, seed=options.seed, drawing=drawing)
    answers = engine.answers(prompts, written, progress=bar.begin("answering with documents"))
    return [answer.document for answer in answers]


def _record_attention(
    engine: Engine, options: DigitsOptions, drawing: DrawingOptions, bar: Bar
) -> tuple[np.ndarray, np.ndarray]:
    bar.begin("recording attention")
    prompts = [Document((Text(caption_of(options.captions[0], number)),)) for number in range(10)]
    pictures, maps = dream_attention(engine, prompts, drawing, range(options.seed, options.seed + 10))
    return to_uint8([to_pil(picture) for picture in pictures]), maps.cpu().numpy()


def _proportion(right: Sequence[bool] | np.ndarray) -> Proportion:
    return Proportion(int(np.sum(right)), len(right))


class Bar:
    """One line that says what is being done; nothing where the console is not a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, description: str) -> OnStep:
        self._bar.reset(self._task, description=description, total=None)
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)
