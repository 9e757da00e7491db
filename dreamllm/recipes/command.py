"""`dreamllm train`."""

from __future__ import annotations

from pathlib import Path

from dreamllm.recipes.registry import run_recipe
from dreamllm.training import RunSettings

DEFAULTS = RunSettings()


def train(
    recipe: str,
    out: Path,
    data: Path | None = None,
    components: Path | None = None,
    seed: int = 42,
    scale: float | None = None,
    settings: RunSettings = DEFAULTS,
) -> None:
    """Trains a DreamLLM by a recipe. Rerun the same command to resume.

    Args:
        recipe: name of the recipe: digits (scanned digits, a few minutes) or small (your own pictures with captions).
        out: folder of the run; the trained model will be in its subfolder model.
        data: folder or file with the training data, for recipes that take it.
        components: folder with subfolders llm, clip and diffusion to start from, for recipes that take it.
        seed: everything random follows from it.
        scale: multiplies the recipe's numbers of steps.
        settings: how the run proceeds on this machine.
    """
    changed = None if settings == DEFAULTS else settings
    run_recipe(recipe, out=out, data=data, components=components, seed=seed, scale=scale, settings=changed)
