"""What `dreamllm chat` does."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from dreamllm.documents import load_picture
from dreamllm.inference.assistant import Assistant, load
from dreamllm.inference.dialogue import Dialogue
from dreamllm.inference.drawing import Progress as OnStep
from dreamllm.inference.drawing import Scheduler, drawing_defaults
from dreamllm.inference.options import GenerationOptions
from dreamllm.inference.terminal import describe, printable
from dreamllm.inference.terminal_pictures import Way, way_of
from dreamllm.inference.terminal_pictures import show as show_picture

Show = Literal["auto", "kitty", "iterm2", "sixel", "blocks", "none"]

_REFERENCE = re.compile(r'(?:^|(?<=\s))@(?:"([^"]+)"|(\S+))')
CHAT_HELP = """\
@FILE        a picture in your message, e.g.  What is this? @seven.png   (quote names with spaces: @"my seven.png")
/image FILE  a picture at the beginning of your next message
/new         forget the dialogue
/help        this list
/quit        leave (also Ctrl-D, Ctrl-C)"""


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
    int8_weights: bool = False,
    show: Show = "auto",
) -> None:
    """A dialogue on the terminal, with pictures in both directions.

    Messages are read from the standard input, one per line. `@file.png` in a message shows the model a picture; /help
    lists the rest. Created pictures are saved and named, and shown where the output is a terminal that can.

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
        int8_weights: keep the language model's weights in eight bits; needs the extra `int8`.
        show: how pictures are shown: by the protocol of kitty or iterm2, as sixel, as coloured half blocks, or none;
            auto finds out what the terminal can.
    """
    assistant = quiet_load(model, device, dtype, int8_weights=int8_weights)
    recommended = drawing_defaults(assistant.engine.model)
    drawing = recommended.changed(steps=steps, guidance_scale=guidance_scale, scheduler=scheduler)
    options = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, drawing=drawing
    )
    way = way_of(sys.stdin, sys.stdout, os.environ) if show == "auto" else show
    _Chat(assistant, options, save, way).run()


class _Chat:
    def __init__(self, assistant: Assistant, options: GenerationOptions, save: Path, way: Way) -> None:
        self._assistant = assistant
        self._options = options
        self._save = save
        self._way = way
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
        with drawing_bar() as on_step:
            answer = self._assistant.engine.answer(asked, self._options, on_step)
        self._dialogue.remember(asked, answer)
        self._waiting = []
        self._options = replace(self._options, seed=self._options.seed + 1)
        paths = [self._store(picture) for picture in answer.pictures]
        print(describe(answer.document, [str(path) for path in paths]) or "(an empty answer)")
        for picture in answer.pictures:
            show_picture(picture, self._way, sys.stdout)
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


def quiet_load(model: Path, device: str, dtype: str, batch_size: int = 32, int8_weights: bool = False) -> Assistant:
    """A model without the weights' own progress bar, which also writes where no terminal is."""
    disable_progress_bar()
    return load(model, device, dtype, batch_size, int8_weights=int8_weights)


@contextmanager
def drawing_bar() -> Iterator[OnStep | None]:
    """A progress bar on the terminal while pictures are drawn; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("drawing", visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)
