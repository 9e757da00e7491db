"""What a benchmark is: its data, how a model is asked, how answers are scored. Each family fills this in once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from dreamllm.documents import VICUNA_V1_1, ChatTemplate, Document, Part, Picture, PictureSource, Text, load_picture
from dreamllm.evaluation.metrics.inception import Resize

Protocol = Literal["original", "plain"]
Clean = Literal["nothing", "short", "capital"]
PROTOCOLS: tuple[Protocol, ...] = ("original", "plain")

EVALUATION_TEMPLATE = ChatTemplate("vicuna_v1.1 for evaluation", f" {VICUNA_V1_1.system}")
"""The copy of the chat template that the original program evaluates with: its system sentence begins with a space."""

CLIP_MEAN = (122, 116, 104)
"""What a picture is padded to a square with: CLIP's mean colour, which its preprocessing makes zero."""


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    `references`: answers or captions by people, empty where only a server has them. `details`: whatever else the
    benchmark's scoring and submission need (plain JSON values).
    """

    id: str
    picture: PictureSource
    question: str = ""
    references: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How an answer is written: `beams` > 1 is beam search without sampling, by transformers' rules; a `temperature`
    above 0 samples. `length_penalty` decides among beams."""

    beams: int = 1
    max_new_tokens: int = 1024
    temperature: float = 0.0
    length_penalty: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


BEAMS = Decoding(beams=5)
"""The original's decoding, but for POPE."""


@dataclass(frozen=True)
class Probe:
    """A question asked first: whether the answer can be known.

    `says_no`: the reply counts as no when it contains "no" anywhere, or when it begins with it. Then the answer is
    `instead`, or, where that is None, the question is asked with its options appended. It is asked of the picture with
    nothing else around it: no system text, no request, no beginning of the answer.
    """

    says_no: Literal["contains", "begins"]
    instead: str | None
    text: str = "Is the answer can be known?"

    def denied(self, reply: str) -> bool:
        lowered = reply.strip().lower()
        return "no" in lowered if self.says_no == "contains" else lowered.startswith("no")


@dataclass(frozen=True)
class Prompting:
    """How a model is asked under one protocol (spec section G.1).

    The user's message is `system`, the picture, the question and `request`, with nothing between them; the answer
    begins with `start`. `template`: None takes the model's own. `form` "pair" shows the picture alone, as captioning
    pairs are trained. `clean` is what becomes of the answer: "short" drops full stops and quotes, keeps what is before
    the first comma, in lower case; "capital" begins it with a capital. `square`: the picture is padded to a square.
    `options`: the options of a single-choice question follow it, one to a line ("A. ...").
    """

    system: str = ""
    request: str = ""
    start: str = ""
    decoding: Decoding = BEAMS
    clean: Clean = "nothing"
    template: ChatTemplate | None = EVALUATION_TEMPLATE
    form: Literal["dialogue", "pair"] = "dialogue"
    square: bool = False
    options: bool = False
    probe: Probe | None = None

    def document(
        self, picture: PictureSource, question: str, own: ChatTemplate, name: str, options: Mapping[str, str]
    ) -> Document:
        """The prompt. `own` is the model's own chat template, `options` those of a single-choice question."""
        shown = Picture(_squared(load_picture(picture)) if self.square else picture, comprehension=True)
        if self.form == "pair":
            return Document((shown,), "error", name)
        if self.options:
            question += "".join(f"\n{letter}. {text}" for letter, text in options.items())
        template = self.template or own
        start = f" {self.start}" if self.start else ""
        before = Text(template.opening(first=True) + self.system, learn=False)
        after = Text(question + self.request + template.closing() + start, learn=False)
        parts: tuple[Part, ...] = (before, shown, after)
        return Document(parts, "error", name)

    def cleaned(self, answer: str) -> str:
        """An answer -> the prediction."""
        answer = answer.strip()
        if self.clean == "short":
            return answer.replace(".", "").replace('"', "").split(",")[0].strip().lower()
        return answer[:1].upper() + answer[1:] if self.clean == "capital" else answer


def _squared(image: Image.Image) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), CLIP_MEAN)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


@dataclass(frozen=True)
class Figure:
    """A number of a benchmark; `value` None: not run, for `reason`. `percent`: shown times 100, as published."""

    value: float | None
    name: str
    reason: str = ""
    percent: bool = True

    def __str__(self) -> str:
        if self.value is None:
            return f"not run: {self.reason}"
        return f"{100 * self.value:.2f}" if self.percent else f"{self.value:.2f}"

    def to_json(self) -> dict[str, Any]:
        shown = None if self.value is None else self.value * (100 if self.percent else 1)
        return {"name": self.name, "value": shown, **({"reason": self.reason} if self.reason else {})}


@dataclass(frozen=True)
class Scores:
    """The figures of a run, the headline first, and each sample's own score in [0, 1] (None where there is none)."""

    figures: tuple[Figure, ...]
    each: tuple[float | None, ...]


Record = Mapping[str, Any]
"""One answered sample: `index`, `id`, `question`, `answer` (raw), `prediction` (cleaned), `references`, `details`."""

Submission = tuple[str, Callable[[Path, Sequence[Record]], None]]
"""A file's name, and what writes it."""


@dataclass(frozen=True)
class Benchmark:
    """What every benchmark tells: see `dreamllm evaluate --list`.

    `files`: what the data folder must hold. `paper`: the figure that the paper reports for DreamLLM-7B.
    """

    name: str
    title: str
    metric: str
    split: str
    files: tuple[str, ...]
    paper: str = ""


@dataclass(frozen=True)
class AnswerBenchmark(Benchmark):
    """Questions about pictures, answered in text."""

    load: Callable[[Path], list[Sample]] = field(kw_only=True)
    score: Callable[[Sequence[Record]], Scores] = field(kw_only=True)
    prompting: Mapping[Protocol, Prompting] = field(kw_only=True)
    submission: Submission | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class DigitsBenchmark(Benchmark):
    """The small model of the recipe `digits`, on scans that come with scikit-learn."""


@dataclass(frozen=True)
class LanguageBenchmark(Benchmark):
    """Text alone, by lm-eval: its `task`, the `key` of its score, and how many examples stand before a question.

    Plain protocol: as lm-eval does by itself, so that the figures compare with others'. Original: without a token at
    the beginning, and with what `original` changes in lm-eval's definition of the task.
    """

    task: str = field(kw_only=True)
    key: str = field(kw_only=True)
    shots: int = field(default=0, kw_only=True)
    original: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class PictureSample:
    """One picture to draw. `prompt`: what it is drawn after; `captions`: what candidates are compared with by CLIP."""

    id: str
    prompt: Document
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; None: as the model's configuration recommends. `candidates`: pictures per prompt."""

    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    candidates: int = 1
    guidance_rescale: float | None = None
    eta: float | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class PictureBenchmark(Benchmark):
    """Pictures drawn for texts, compared with real ones as a set.

    `statistics`: the file with the features of the real pictures; `real`: instead of it, the real pictures themselves.
    `side`: drawn and real pictures are resized and cropped to this many pixels before the network resizes them by
    `resize`. More than one candidate: CLIP chooses the one that agrees best with any of the captions.
    """

    load: Callable[[Path], list[PictureSample]] = field(kw_only=True)
    drawing: Mapping[Protocol, Drawing] = field(kw_only=True)
    statistics: str = field(default="", kw_only=True)
    real: Callable[[Path], list[PictureSource]] | None = field(default=None, kw_only=True)
    side: int = field(default=256, kw_only=True)
    resize: Resize = field(default="bilinear", kw_only=True)
