"""Where dream queries look: at pictures of the prompt, and at the picture that they lead to."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamllm.documents import Document
from dreamllm.evaluation.attention import dream_attention, reading_attention
from dreamllm.inference import DrawingOptions, Engine
from dreamllm.inference.drawing import to_pil
from dreamllm.inference.page import data_uri


@dataclass(frozen=True)
class AttentionTask:
    """The picture after `prompt` is to be drawn and looked into."""

    prompt: Document
    drawing: DrawingOptions
    seed: int


def look(engine: Engine, task: AttentionTask) -> dict[str, Any]:
    """What the page shows, as JSON: the picture, and maps over it and over each picture of the prompt."""
    pictures, maps = dream_attention(engine, [task.prompt], task.drawing, [task.seed])
    read = list(reading_attention(engine, task.prompt)) if task.prompt.pictures() else []
    return {
        "picture": data_uri(to_pil(pictures[0])),
        "seed": task.seed,
        "drawn": maps_as_json(maps[0]),
        "read": [maps_as_json(one) for one in read],
    }


def maps_as_json(maps_Qhw: Tensor) -> dict[str, Any]:
    """Maps [Q, h, w] as bytes in base64, each scaled by its own `peaks`; `shares`: the mean of each."""
    maps = maps_Qhw.float().cpu()
    peaks = maps.flatten(1).amax(1)
    scaled = (maps / peaks.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None] * 255).round().to(torch.uint8)
    return {
        "queries": maps.shape[0],
        "height": maps.shape[1],
        "width": maps.shape[2],
        "maps": base64.b64encode(scaled.numpy().tobytes()).decode("ascii"),
        "peaks": peaks.tolist(),
        "shares": maps.flatten(1).mean(1).tolist(),
    }
