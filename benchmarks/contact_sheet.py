"""The same pictures drawn with the fused operators and without: `python -m benchmarks.contact_sheet --model FOLDER`.

Writes a picture of three panels, rows captions and columns seeds: drawn with the fused operators, with the libraries'
own code, and their difference, amplified. Prints the largest difference and the time per picture of both, contenders
alternating in one process. The exit status is 1 where the pictures differ by more than 1e-3 of their range.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dreamllm.documents import Document, Text
from dreamllm.evaluation.digits import WORDS
from dreamllm.inference import Assistant, DrawingOptions, draw, drawing_defaults, load

LIMIT = 1e-3
FUSED, LIBRARIES = "fused operators", "libraries' own code"
TILE, GAP, MARGIN, TITLE = 32, 2, 12, 20
"""In pixels: the least side of a picture on the sheet, the space between two, around a panel, and for its title."""


@dataclass(frozen=True)
class Comparison:
    """`pictures` by contender: float32 [captions * seeds, channels, height, width]; `seconds` of each round."""

    pictures: dict[str, Tensor]
    seconds: dict[str, list[float]]

    @property
    def difference(self) -> Tensor:
        return self.pictures[FUSED] - self.pictures[LIBRARIES]

    def seconds_per_picture(self, contender: str) -> float:
        return statistics.median(self.seconds[contender]) / len(self.pictures[contender])


def compare(
    assistants: dict[str, Assistant], captions: Sequence[str], seeds: int, options: DrawingOptions, rounds: int
) -> Comparison:
    """Draws every caption with seeds 0, 1, ... `rounds` times after one that is not timed, from the prompt on."""
    prompts = [Document((Text(caption),)) for caption in captions]
    pictures: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in assistants}
    for number in range(rounds + 1):
        for name, assistant in assistants.items():
            engine, begin = assistant.engine, time.perf_counter()
            null = engine.null_condition(options.negative_prompt)
            conditions = engine.conditions(prompts).repeat_interleave(seeds, dim=0)
            drawn = draw(engine.model, conditions, null, options, list(range(seeds)) * len(captions))
            pictures[name] = drawn.cpu()  # waits for the device
            if number > 0:
                seconds[name].append(time.perf_counter() - begin)
    return Comparison(pictures, seconds)


def sheet(panels: dict[str, Tensor], columns: int) -> Image.Image:
    """Panels side by side under their titles, pictures in rows of `columns`, enlarged without smoothing."""
    grids = {title: _grid(pictures, columns) for title, pictures in panels.items()}
    height, width = next(iter(grids.values())).shape[:2]
    result = Image.new("RGB", (len(grids) * (width + MARGIN) + MARGIN, height + TITLE + 2 * MARGIN), "white")
    pen, font = ImageDraw.Draw(result), ImageFont.load_default()
    for number, (title, grid) in enumerate(grids.items()):
        left = MARGIN + number * (width + MARGIN)
        pen.text((left, MARGIN), title, fill="black", font=font)
        result.paste(Image.fromarray(grid), (left, MARGIN + TITLE))
    return result


def _grid(pictures: Tensor, columns: int) -> np.ndarray:
    """uint8 [height, width, 3] of pictures [N, 1 or 3, H, W] in [0, 1], white between them."""
    scale = -(-TILE // pictures.shape[-1])
    large = pictures.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3).expand(-1, 3, -1, -1)
    framed = torch.nn.functional.pad(large, (0, GAP, 0, GAP), value=1.0)
    count, channels, height, width = framed.shape
    rows = framed.reshape(count // columns, columns, channels, height, width)
    grid = rows.permute(0, 3, 1, 4, 2).reshape(count // columns * height, columns * width, channels)
    return (grid.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def amplification(difference: Tensor) -> float:
    """The largest power of ten that keeps half a range of 1; 1 where there is nothing to amplify."""
    largest = float(difference.abs().max())
    return 10.0 ** max(0, math.floor(math.log10(0.5 / largest))) if 0.0 < largest < math.inf else 1.0


def report(comparison: Comparison, options: DrawingOptions) -> str:
    """The figures in a few lines."""
    difference = comparison.difference.abs()
    count, _, height, width = difference.shape
    bytes_of = [(pictures * 255).round() for pictures in comparison.pictures.values()]
    fused, libraries = (1e3 * comparison.seconds_per_picture(name) for name in (FUSED, LIBRARIES))
    return "\n".join(
        (
            f"{count} pictures of {width}x{height}: {options.steps} steps of {options.scheduler}, guidance "
            f"{options.guidance_scale}; torch {torch.__version__}, {torch.get_num_threads()} threads",
            f"largest difference {difference.max():.1e} of a range of 1, mean {difference.mean():.1e}; "
            f"{int((bytes_of[0] != bytes_of[1]).sum())} of {difference.numel()} values differ in 8 bits",
            f"{fused:.2f} ms per picture with the {FUSED}, {libraries:.2f} with the {LIBRARIES}: "
            f"{libraries / fused:.2f} times as fast",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contact_sheet", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model folder, e.g. runs/digits/model")
    parser.add_argument("--out", type=Path, help="where the picture is written (PNG); default: nowhere")
    parser.add_argument("--captions", nargs="+", default=list(WORDS), help="default: the digits' names")
    parser.add_argument("--seeds", type=int, default=6, help="pictures per caption")
    parser.add_argument("--steps", type=int, help="default: as the model recommends, like the next two")
    parser.add_argument("--scheduler", choices=("ddpm", "ddim", "dpm++"))
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.rounds < 1:
        parser.error("--seeds and --rounds must be at least 1")
    assistants = {
        FUSED: load(given.model, given.device),
        LIBRARIES: load(given.model, given.device, fused_operators=False),
    }
    recommended = vars(drawing_defaults(assistants[FUSED].engine.model))
    wanted = {name: vars(given)[name] for name in ("steps", "scheduler", "guidance_scale")}
    options = DrawingOptions(**recommended | {name: value for name, value in wanted.items() if value is not None})
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 alone would differ by about the limit
        comparison = compare(assistants, given.captions, given.seeds, options, given.rounds)
    print(report(comparison, options))
    if given.out is not None:
        factor = amplification(comparison.difference)
        amplified = {f"difference x {factor:,.0f} (grey: none)": 0.5 + factor * comparison.difference}
        sheet(comparison.pictures | amplified, given.seeds).save(given.out)
        print(f"written: {given.out}")
    if not comparison.difference.abs().max() <= LIMIT:  # also where a value is not a number
        print(f"the pictures differ by more than {LIMIT:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
