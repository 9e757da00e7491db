"""The recipes by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamllm.recipes import small
from dreamllm.recipes.digits import recipe as digits


@dataclass(frozen=True)
class Recipe:
    """A complete run: `run(out, seed, further options...)` does everything and returns the model's folder.

    A recipe may prepare components, train stages with `dreamllm.training.run`, and evaluate. Its options are the
    parameters of `run`; those without a default must be given. Rerunning it with the same arguments resumes.
    """

    run: Callable[..., Path]
    summary: str

    def options(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.run).parameters)


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(digits.run, "scanned digits, with evaluation and report; minutes on a CPU"),
    "small": Recipe(small.run, "any folder of pictures with captions, or webdataset tars; small components"),
}


def recipe(name: str) -> Recipe:
    """Looks a recipe up. Raises `ValueError` listing the known ones, the nearest name first."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    known = "\n".join(f"  {known}: {entry.summary}" for known, entry in RECIPES.items())
    raise ValueError(f"unknown recipe {name!r}.{meant} Known recipes:\n{known}")


def run_recipe(name: str, **options: Any) -> Path:
    """Runs recipe `name`; options that are None count as not given. Returns the folder of the trained model.

    Raises `ValueError` for an unknown recipe, an option that it does not take, and one that it needs and was not given.
    """
    chosen = recipe(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = chosen.options()
    surplus = [key for key in given if key not in known]
    if surplus:
        taken = ", ".join(f"--{key}" for key in known)
        raise ValueError(f"recipe {name!r} does not take {', '.join(f'--{key}' for key in surplus)}; it takes {taken}")
    missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in given]
    if missing:
        raise ValueError(f"recipe {name!r} needs {', '.join(f'--{key}' for key in missing)}")
    return chosen.run(**given)
