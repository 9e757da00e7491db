"""Access to the numbers recorded from the original program (see README.md here)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent / "reference-a"
CHECKPOINT, CLIP, DIFFUSION = ROOT / "checkpoint", ROOT / "components" / "clip", ROOT / "components" / "sd"

TRAINED = {"language_model", "embeddings", "lm_head", "visual_projector", "dream_queries", "condition_projector"}
"""The parameter groups of the stage in which the gradients were recorded."""


@cache
def _arrays() -> dict[str, np.ndarray]:
    return dict(np.load(ROOT / "golden.npz"))


def array(name: str) -> torch.Tensor:
    return torch.from_numpy(_arrays()[name].copy())


def gradient_names() -> list[str]:
    return sorted(name.removeprefix("grad:") for name in _arrays() if name.startswith("grad:"))


def samples() -> list[dict]:
    return json.loads((ROOT / "sequences.json").read_text())["samples"]


def sequence_settings() -> dict:
    data = json.loads((ROOT / "sequences.json").read_text())
    return {key: data[key] for key in ("tokens_per_image", "num_dream_queries")} | {
        "max_length": data["model_max_length"]
    }
