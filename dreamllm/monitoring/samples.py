"""What a model makes of fixed prompts while it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dreamllm.documents import Document, Picture, Text
from dreamllm.inference import Answer, Engine, GenerationOptions
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.training import write_text

FOLDER, FILE = "samples", "samples.jsonl"


@dataclass(frozen=True)
class SampleSettings:
    """What is sampled from a model in training.

    Attributes:
        every: steps between samples; 0: none.
        draw: captions to draw.
        caption: picture files to describe.
        chat: messages to answer, with text and pictures.
        max_new_tokens: of captions and answers.
        seed: of the pictures' noise, the same each time.
    """

    every: int = 0
    draw: list[str] = field(default_factory=list)
    caption: list[Path] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"samples.every must not be negative: {self.every}")
        if self.every and not (self.draw or self.caption or self.chat):
            raise ValueError(
                "samples.every is given, but nothing to sample: samples.draw, samples.caption, samples.chat"
            )
        missing = [str(path) for path in self.caption if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f"pictures of samples.caption do not exist: {', '.join(missing)}")


@dataclass(frozen=True)
class Sample:
    """One answer at one moment. `pictures`: files, relative to the run's folder."""

    stage: str
    step: int
    prompt: str
    text: str
    pictures: tuple[str, ...]


class SampleWriter:
    """Answers the same prompts every few steps and writes text and pictures into the run's folder.

    A `RunObserver`. The training's result does not depend on it: it draws from generators of its own. With a sharded
    model every process computes the samples, and the one with `writes` stores them. A run that is resumed replaces what
    it had sampled after its checkpoint.
    """

    def __init__(self, run: Path, settings: SampleSettings, writes: bool = True) -> None:
        self.run, self.settings, self.writes = run, settings, writes

    def needs_model(self, step: int) -> bool:
        return bool(self.settings.every) and step % self.settings.every == 0

    def after_step(self, stage: str, step: int, model: DreamLLM, processor: DreamLLMProcessor) -> None:
        if not self.needs_model(step):
            return
        training = model.training
        model.eval()
        try:
            answers = self._answers(Engine(model, processor))
        finally:
            model.train(training)
        if self.writes:
            self._write(stage, step, answers)

    def line(self, line: dict[str, object]) -> None:
        """Metrics are not its concern."""

    def close(self) -> None:
        """Nothing is kept open."""

    def _answers(self, engine: Engine) -> list[tuple[str, Answer]]:
        settings = self.settings
        drawing = GenerationOptions(max_new_tokens=0, pictures="force", seed=settings.seed)
        reading = GenerationOptions(settings.max_new_tokens, pictures="forbid", seed=settings.seed)
        talking = GenerationOptions(settings.max_new_tokens, seed=settings.seed)
        captions = [Document((Text(text),), "error", "caption") for text in settings.draw]
        pictures = [Document((Picture(path, comprehension=True),), "error", path.name) for path in settings.caption]
        messages = [engine.processor.chat([("user", text)], ()) for text in settings.chat]
        named: list[tuple[str, Answer]] = []
        for what, names, prompts, options in (
            ("draw", settings.draw, captions, drawing),
            ("describe", [path.name for path in settings.caption], pictures, reading),
            ("answer", settings.chat, messages, talking),
        ):
            if prompts:
                answers = engine.answers(prompts, options)
                named += [(f"{what}: {name}", answer) for name, answer in zip(names, answers, strict=True)]
        return named

    def _write(self, stage: str, step: int, answers: Sequence[tuple[str, Answer]]) -> None:
        folder = self.run / FOLDER / stage
        folder.mkdir(parents=True, exist_ok=True)
        lines = [sample for sample in read_samples(self.run) if sample.stage != stage or sample.step < step]
        for number, (prompt, answer) in enumerate(answers):
            files = []
            for k, picture in enumerate(answer.pictures):
                path = folder / f"step_{step:06d}_{number}_{k}.png"
                picture.save(path)
                files.append(str(path.relative_to(self.run)))
            lines.append(Sample(stage, step, prompt, answer.text, tuple(files)))
        write_text(self.run / FILE, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in lines))


def read_samples(run: str | Path) -> list[Sample]:
    """The samples of a run, in the order in which they were made; none when it sampled nothing."""
    path = Path(run) / FILE
    if not path.is_file():
        return []
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Sample(**{**value, "pictures": tuple(value["pictures"])}) for value in values]
