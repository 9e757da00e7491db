"""What `dreamllm generate` and `dreamllm chat` do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import get_terminal_size

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from dreamllm.documents import Document, Picture, Text, load_picture
from dreamllm.documents import prompt as prompt_document
from dreamllm.inference.assistant import Assistant, load
from dreamllm.inference.dialogue import Dialogue
from dreamllm.inference.drawing import DrawingOptions, Scheduler, drawing_defaults
from dreamllm.inference.drawing import Progress as OnStep
from dreamllm.inference.options import Answer, GenerationOptions, Pictures
from dreamllm.inference.page import write_page
from dreamllm.inference.terminal import describe, half_blocks, printable

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PAGE_SUFFIXES = (".html", ".htm")
_REFERENCE = re.compile(r'(?:^|(?<=\s))@(?:"([^"]+)"|(\S+))')
CHAT_HELP = """\
@FILE        a picture in your message, e.g.  What is this? @seven.png   (quote names with spaces: @"my seven.png")
/image FILE  a picture at the beginning of your next message
/new         forget the dialogue
/help        this list
/quit        leave (also Ctrl-D, Ctrl-C)"""


def generate(
    prompt: str,
    model: Path,
    out: Path | None = None,
    images: Sequence[Path] = (),
    raw: bool = False,
    draw: bool = False,
    pictures: Pictures = "allow",
    max_new_tokens: int = 512,
    max_pictures: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: Scheduler | None = None,
    size: int | None = None,
    candidates: int | None = None,
    negative_prompt: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Answer:
    """Answers one prompt with text and pictures, prints the text and writes a page or the pictures.

    Args:
        prompt: the message to the model. `<image>` stands for the next of `images`; without it they come first.
        model: a model folder.
        out: where the answer goes: a page (.html), or its pictures (.png, .jpg, .webp; numbered when several).
        images: picture files that the prompt shows to the model.
        raw: continue the prompt as it stands instead of wrapping it in the model's chat template.
        draw: draw a picture for the prompt, taken as a raw caption, and write nothing.
        pictures: allow lets the model decide, forbid never draws, force draws one before anything is written.
        max_new_tokens: most tokens that are written.
        max_pictures: most pictures in the answer; default: as many as the context holds.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: with a temperature, sample from the smallest set of tokens that reaches this probability.
        top_k: with a temperature, sample from this many tokens; 0: all.
        seed: decides sampling and the pictures' noise.
        steps: denoising steps; default, as for the next five: what the model recommends.
        guidance_scale: weight of classifier-free guidance; up to 1: none.
        scheduler: ddpm, ddim or dpm++.
        size: side of the pictures in pixels.
        candidates: pictures to draw for the caption; with `draw` only.
        negative_prompt: what pictures are led away from.
        device: cpu, cuda, cuda:1, ...
        dtype: of the weights: float32, bfloat16 or float16.

    Raises `ValueError` for a prompt that is empty or does not fit, an unknown suffix of `out` (before anything is
    computed), or an answer without pictures where a picture file was wanted; `PictureError` for a bad picture file.
    """
    _check_out(out)
    if draw and (raw or images or pictures != "allow"):
        raise ValueError("draw takes a raw caption and no images; leave raw, images and pictures away")
    assistant = _load(model, device, dtype)
    given = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "size": size,
        "candidates": candidates,
        "negative_prompt": negative_prompt,
    }
    drawing = _drawing(assistant, given)
    options = GenerationOptions(
        max_new_tokens=0 if draw else max_new_tokens,
        max_pictures=max_pictures,
        pictures="force" if draw else pictures,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        drawing=drawing,
    )
    question = _question(assistant, prompt, images, templated=not (raw or draw))
    with _drawing_bar() as on_step:
        answer = assistant.engine.answer(question, options, on_step)
    names = [f"picture {i}" for i in range(1, len(answer.pictures) + 1)]
    print(describe(answer.document, names))
    if out is not None:
        _write(out, answer, _shown_question(prompt, images))
    return answer


def chat(
    model: Path,
    save: Path = Path("chat-pictures"),
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: Scheduler | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """A dialogue on the terminal, with pictures in both directions.

    Messages are read from the standard input, one per line. `@file.png` in a message shows the model a picture; /help
    lists the rest. Created pictures are saved and named, and shown where the output is a terminal.

    Args:
        model: a model folder.
        save: folder for created pictures, made when the first is saved.
        max_new_tokens: most tokens of one answer.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: with a temperature, sample from the smallest set of tokens that reaches this probability.
        top_k: with a temperature, sample from this many tokens; 0: all.
        seed: of the first answer; later ones count up.
        steps: denoising steps; default, as for the next two: what the model recommends.
        guidance_scale: weight of classifier-free guidance; up to 1: none.
        scheduler: ddpm, ddim or dpm++.
        device: cpu, cuda, cuda:1, ...
        dtype: of the weights: float32, bfloat16 or float16.
    """
    assistant = _load(model, device, dtype)
    drawing = _drawing(assistant, {"steps": steps, "guidance_scale": guidance_scale, "scheduler": scheduler})
    options = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, drawing=drawing
    )
    _Chat(assistant, options, save).run()


class _Chat:
    def __init__(self, assistant: Assistant, options: GenerationOptions, save: Path) -> None:
        self._assistant = assistant
        self._options = options
        self._save = save
        self._dialogue = Dialogue(assistant.engine.processor.template)
        self._waiting: list[Image.Image] = []

    def run(self) -> None:
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            print(CHAT_HELP)
        try:
            while True:
                line = input("\n> " if at_terminal else "").strip()
                if line in ("/quit", "/exit"):
                    return
                if line:
                    self._handle(line)
        except (EOFError, KeyboardInterrupt):
            if at_terminal:
                print()

    def _handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        try:
            if command == "/help":
                print(CHAT_HELP)
            elif command == "/new":
                self._dialogue.forget()
                self._waiting = []
                print("The dialogue starts anew.")
            elif command == "/image" and not argument.strip():
                print("Name a file: /image FILE")
            elif command == "/image":
                self._waiting.append(load_picture(Path(argument.strip().strip('"')).expanduser()))
                print("The picture goes with your next message.")
            elif command.startswith("/"):
                print(f"Unknown command {printable(command)}; /help lists them.")
            else:
                self._answer(line)
        except (ValueError, OSError) as error:
            print(f"Cannot answer: {printable(str(error))}")

    def _answer(self, line: str) -> None:
        text, named = _resolve_references(line)
        pictures = [*self._waiting, *named]
        asked = self._dialogue.ask("<image> " * len(self._waiting) + text, pictures)
        with _drawing_bar() as on_step:
            answer = self._assistant.engine.answer(asked, self._options, on_step)
        self._dialogue.remember(asked, answer)
        self._waiting = []
        self._options = replace(self._options, seed=self._options.seed + 1)
        paths = [self._store(picture) for picture in answer.pictures]
        print(describe(answer.document, [str(path) for path in paths]) or "(an empty answer)")
        if sys.stdout.isatty():
            for picture in answer.pictures:
                print(half_blocks(picture, get_terminal_size().columns - 2))
        if answer.stopped != "end":
            reason = {"length": "max_new_tokens was reached", "context": "the context is full; /new starts anew"}
            print(f"(cut off: {reason[answer.stopped]})")

    def _store(self, picture: Image.Image) -> Path:
        self._save.mkdir(parents=True, exist_ok=True)
        number = 1
        while (path := self._save / f"picture-{number:03d}.png").exists():
            number += 1
        picture.save(path)
        return path


def _resolve_references(line: str) -> tuple[str, list[Image.Image]]:
    """Replaces each `@file` by `<image>` and loads the files."""
    if "<image>" in line:
        raise ValueError("write @FILE where the picture stands, not <image>")
    pictures = [load_picture(Path(quoted or bare).expanduser()) for quoted, bare in _REFERENCE.findall(line)]
    return _REFERENCE.sub("<image>", line), pictures


def _load(model: Path, device: str, dtype: str) -> Assistant:
    disable_progress_bar()  # the weights' own bar, which also writes where no terminal is
    return load(model, device, dtype)


def _drawing(assistant: Assistant, given: dict) -> DrawingOptions:
    changed = {name: value for name, value in given.items() if value is not None}
    return replace(drawing_defaults(assistant.engine.model), **changed)


def _question(assistant: Assistant, text: str, images: Sequence[Path], templated: bool) -> Document:
    if not text.strip() and not images:
        raise ValueError("the prompt is empty; give it text or a picture")
    if images and "<image>" not in text:
        text = "<image> " * len(images) + text
    sources = [Path(image) for image in images]
    if templated:
        return Dialogue(assistant.engine.processor.template).ask(text, sources)
    return prompt_document(text, sources)


def _shown_question(text: str, images: Sequence[Path]) -> Document:
    return Document(
        (*(Picture(Path(image), comprehension=True) for image in images), Text(text.replace("<image>", "")))
    )


def _check_out(out: Path | None) -> None:
    known = (*PAGE_SUFFIXES, *PICTURE_SUFFIXES)
    if out is not None and Path(out).suffix.lower() not in known:
        raise ValueError(f"cannot tell what to write into {out}: its suffix must be one of {', '.join(known)}")


def _write(out: Path, answer: Answer, question: Document) -> None:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in PAGE_SUFFIXES:
        write_page(out, answer.document, prompt=question)
        print(f"Wrote {out}", file=sys.stderr)
        return
    if not answer.pictures:
        raise ValueError(
            f"the answer has no picture to write into {out}; write a page (.html), or use --pictures force"
        )
    several = len(answer.pictures) > 1
    for number, picture in enumerate(answer.pictures, start=1):
        path = out.with_stem(f"{out.stem}-{number}") if several else out
        picture.save(path)
        print(f"Wrote {path}", file=sys.stderr)


@contextmanager
def _drawing_bar() -> Iterator[OnStep | None]:
    """A progress bar on the terminal while pictures are drawn; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("drawing", visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)
