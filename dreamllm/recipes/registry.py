"""The recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dreamllm.recipes import paper, small
from dreamllm.recipes.digits import recipe as digits


@dataclass(frozen=True)
class Recipe:
    """A complete run: `run(out, seed, further options...)` does everything and returns the model's folder, or None when
    it was only to plan.

    A recipe may prepare components, train stages with `dreamllm.training.run`, and evaluate. The parameters of `run`
    are the options of `dreamllm train NAME`; its docstring describes them. The same arguments again resume.
    """

    run: Callable[..., Path | None]


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(digits.run),
    "small": Recipe(small.run),
    "stage1": Recipe(paper.stage1),
    "stage1_comprehension": Recipe(paper.stage1_comprehension),
    "stage1_creation": Recipe(paper.stage1_creation),
    "stage2": Recipe(paper.stage2),
    "stage3": Recipe(paper.stage3),
}
