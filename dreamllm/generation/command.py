"""What `dreamllm generate` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from dreamllm.documents import Document, Picture, Text
from dreamllm.evaluation.progress import progress_bar
from dreamllm.generation.asked import Asked
from dreamllm.generation.lines import check_lines, read_lines
from dreamllm.generation.run import ANSWERS_FILE, Launched, Run
from dreamllm.inference import Answer, write_page
from dreamllm.inference.command import drawing_bar, quiet_load
from dreamllm.inference.drawing import Scheduler
from dreamllm.inference.options import Pictures
from dreamllm.inference.terminal import describe

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PAGE_SUFFIXES = (".html", ".htm")


def generate(
    model: Path,
    prompt: str = "",
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
    select: str | None = None,
    negative_prompt: str | None = None,
    rewrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    int8_weights: bool = False,
    prompts: Path | None = None,
    batch_size: int = 8,
    keep_going: bool = False,
) -> Answer | None:
    """Answers one prompt, or a file of them, with text and pictures.

    One prompt: prints the text and writes a page or the pictures. A file of prompts: JSON lines such as {"prompt":
    "What is this?", "images": ["seven.png"], "seed": 3, "id": "a"} with any of the options below that concern one
    prompt; those given here hold where a line does not say. Answers go to OUT/answers.jsonl, pictures beside it. Rerun
    the same command to go on; start it with torchrun for one process per GPU. Results do not depend on either.

    Args:
        prompt: the message to the model. `<image>` stands for the next of `images`; without it they come first.
        model: a model folder.
        out: where the answer goes: a page (.html), or its pictures (.png, .jpg, .webp; numbered when several); with
            prompts: a folder.
        images: picture files that the prompt shows to the model.
        raw: continue the prompt as it stands instead of wrapping it in the model's chat template.
        draw: draw a picture for the prompt, taken as a raw caption, and write nothing.
        pictures: allow lets the model decide, forbid never draws, force draws one before anything is written.
        max_new_tokens: most tokens that are written.
        max_pictures: most pictures in the answer; default: as many as the context holds.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: with a temperature, sample from the smallest set of tokens that reaches this probability.
        top_k: with a temperature, sample from this many tokens; 0: all.
        seed: decides sampling and the pictures' noise; with prompts, line n has this seed plus n.
        steps: denoising steps; default, as for the next six: what the model recommends.
        guidance_scale: weight of classifier-free guidance; up to 1: none.
        scheduler: ddpm, ddim or dpm++.
        size: side of the pictures in pixels.
        candidates: pictures to draw for a caption; with `draw` or `select` only.
        select: folder of a CLIP model that chooses one of the candidates; default: all are kept.
        negative_prompt: what pictures are led away from.
        rewrite: with `draw`: the model words the caption itself before it draws.
        device: cpu, cuda, cuda:1, ...
        dtype: of the weights: float32, bfloat16 or float16.
        int8_weights: keep the language model's weights in eight bits; needs the extra `int8`.
        prompts: a file of prompts, one JSON object per line; paths of its images are relative to it.
        batch_size: with prompts: consecutive lines that are answered together.
        keep_going: with prompts: record a line that cannot be answered, instead of stopping.

    Raises `ValueError` for a prompt that is empty or does not fit, an unknown suffix of `out` (before anything is
    computed), or an answer without pictures where a picture file was wanted; `PictureError` for a bad picture file.
    """
    asked = Asked(
        prompt, tuple(images), raw, draw, pictures, max_new_tokens, max_pictures, temperature, top_p, top_k, seed,
        steps, guidance_scale, scheduler, size, candidates, select, negative_prompt, rewrite,
    )  # fmt: skip
    if prompts is not None:
        if prompt or images:
            raise ValueError("give a prompt (and images) or --prompts, not both")
        if out is None:
            raise ValueError("--prompts needs --out, a folder for the answers")
        _answer_file(prompts, asked, model, out, batch_size, keep_going, device, dtype, int8_weights)
        return None
    _check_out(out)
    asked.check()
    assistant = quiet_load(model, device, dtype, int8_weights=int8_weights)
    question, options = asked.prompt_and_options(assistant)
    with drawing_bar() as on_step:
        answer = assistant.engine.answer(question, options, on_step)
    names = [f"picture {i}" for i in range(1, len(answer.pictures) + 1)]
    print(describe(answer.document, names))
    if out is not None:
        _write(out, answer, _shown_question(prompt, images))
    return answer


def _answer_file(
    prompts: Path,
    defaults: Asked,
    model: Path,
    out: Path,
    batch_size: int,
    keep_going: bool,
    device: str,
    dtype: str,
    int8_weights: bool,
) -> None:
    console = Console(stderr=True)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if not Path(model).is_dir():
        raise FileNotFoundError(f"model folder {model} does not exist")
    lines = read_lines(Path(prompts), defaults)
    if not keep_going:
        check_lines(prompts, lines)
    launched = Launched.of_environment()
    device = launched.device(device)
    run = Run(lines, Path(out), batch_size, keep_going)
    run.claim(Path(prompts), Path(model), defaults, dtype, int8_weights, partial(console.print, markup=False))
    with progress_bar(console, "answering", len(lines)) as progress:
        show = (lambda done: progress(done, len(lines))) if launched.rank == 0 else (lambda done: None)
        show(run.done())
        run.work(lambda: quiet_load(model, device, dtype, batch_size, int8_weights), launched, show)
    if run.finish():
        console.print(f"{len(lines)} answers: {out / ANSWERS_FILE}", markup=False, highlight=False, soft_wrap=True)


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
