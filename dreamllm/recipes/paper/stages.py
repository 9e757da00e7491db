"""The stages' settings: the paper's, and those of the original program's configurations where they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dreamllm.data import PairMode
from dreamllm.training.configuration import StageKind

Variant = Literal["paper", "original_code"]
PAPER_GPUS = 128


@dataclass(frozen=True)
class OptimSettings:
    """Changes of a recipe's optimisation; None keeps the recipe's value.

    Attributes:
        lr: peak learning rate; linear warm-up, then cosine to 0.
        warmup_ratio: share of the steps in which the rate rises.
        weight_decay: of AdamW.
        betas: of AdamW.
        eps: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        epochs: passes through the virtual sizes.
        steps: optimiser steps, in place of epochs.
        condition_dropout: share of pictures whose condition is that of the empty prompt.
        snr_gamma: weight of the diffusion loss by signal-to-noise ratio.
    """

    lr: float | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    max_grad_norm: float | None = None
    epochs: float | None = None
    steps: int | None = None
    condition_dropout: float | None = None
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("optim.epochs and optim.steps both say how long the stage is; give one of them")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"optim.epochs must be positive, not {self.epochs}")

    def changes(self) -> dict[str, Any]:
        """What `StageConfig` is to be given."""
        names = {"lr": "learning_rate"}
        left = {
            name: value for name, value in vars(self).items() if value is not None and name not in ("epochs", "steps")
        }
        return {names.get(name, name): value for name, value in left.items()}


@dataclass(frozen=True)
class BatchSettings:
    """Changes of a recipe's batches; None keeps the recipe's value.

    Attributes:
        documents: documents per optimiser step, over all GPUs.
        per_pass: documents per GPU and pass. Their quotient is the number of micro-batches, which the number of GPUs
            must divide.
        tokens: tokens per GPU and pass instead: documents are chosen so that a pass is full, whatever their lengths.
        pictures: most pictures to create in such a pass.
        look_ahead: documents that are held back to choose from.
        micro_batches: passes that share a step when they are filled by tokens; by default as many as the recipe has.
    """

    documents: int | None = None
    per_pass: int | None = None
    tokens: int | None = None
    pictures: int | None = None
    look_ahead: int = 64
    micro_batches: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is None:
            if self.pictures is not None or self.micro_batches is not None:
                raise ValueError("batch.pictures and batch.micro_batches belong to batch.tokens, which is not given")
        elif self.documents is not None or self.per_pass is not None:
            raise ValueError("batch.tokens takes the place of batch.documents and batch.per_pass")


@dataclass(frozen=True)
class PaperStage:
    """One stage of one variant. `sizes`: virtual size of each dataset per epoch; `filters`: of every dataset."""

    kind: StageKind
    summary: str
    mode: PairMode
    sizes: Mapping[str, int]
    learning_rate: float
    epochs: int = 1
    documents_per_gpu: int = 8
    filters: Mapping[str, Any] = field(default_factory=dict)
    flip_targets: bool = False
    paper_hours: float | None = None

    @property
    def documents_per_epoch(self) -> int:
        return sum(self.sizes.values())


def steps(epochs: float, documents_per_epoch: int, documents_per_step: float) -> int:
    """Optimiser steps; `documents_per_step` may be a mean."""
    return math.ceil(epochs * documents_per_epoch / documents_per_step)


_LAION = {"blip_laion": 8_000_000, "laion400m": 11_000_000, "laion_coco": 11_000_000}
_ORIGINAL_LAION = {"laion400m_orig": 20_000_000, "laion_coco": 20_000_000, "blip_laion": 20_000_000}
_BOTH, _READ, _CREATE = (
    "alignment: projectors and queries",
    "alignment, the half that reads pictures",
    "alignment, the half that creates pictures",
)
_GENERATIVE, _INSTRUCTIONS = "interleaved generative pre-training", "instruction tuning"

STAGES: dict[Variant, dict[str, PaperStage]] = {
    "paper": {
        "stage1": PaperStage("stage1", _BOTH, "both", {"llava_pretrain": 558_000, **_LAION}, 2e-3, paper_hours=6.0),
        "stage1_comprehension": PaperStage(
            "stage1_comprehension", _READ, "comprehension", {"llava_pretrain": 558_000, **_LAION}, 2e-3
        ),
        "stage1_creation": PaperStage("stage1_creation", _CREATE, "creation", _LAION, 2e-3),
        "stage2": PaperStage(
            "stage2", _GENERATIVE, "both", {"mmc4_core": 2_000_000, "blip_laion": 2_000_000}, 2e-5, paper_hours=10.0
        ),
        "stage3": PaperStage(
            "stage3",
            _INSTRUCTIONS,
            "both",
            {"llava_instruct_filter": 80_000, "mmc4_instruct": 20_000, "instruct_blip_laion": 20_000},
            4e-5,
            epochs=3,
            paper_hours=1.5,
        ),
    },
    "original_code": {
        "stage1_comprehension": PaperStage(
            "stage1_comprehension",
            _READ,
            "comprehension",
            {"llava_pretrain": 558_000, **_ORIGINAL_LAION, "gqa": 13_532_530},
            2e-3,
            documents_per_gpu=16,
        ),
        "stage1_creation": PaperStage(
            "stage1_creation", _CREATE, "creation", _ORIGINAL_LAION, 2e-3, documents_per_gpu=16, flip_targets=True
        ),
        "stage2": PaperStage(
            "stage2",
            _GENERATIVE,
            "both",
            {"mmc4_core": 7_000_000, "blip_laion": 10_000_000},
            2e-5,
            documents_per_gpu=16,
            flip_targets=True,
        ),
        "stage3": PaperStage(
            "stage3",
            _INSTRUCTIONS,
            "both",
            {"llavav1.5_instruct": 665_298, "blip_laion": 600_000, "mmc4_instruct": 20_231},
            4e-5,
            documents_per_gpu=16,
            filters={"min_size": 128},
            flip_targets=True,
        ),
    },
}
"""Spec C.1 and D.2 (the paper), C.2 and D.2 (the released configurations). Warm-up 0.003, no weight decay, cosine to 0,
AdamW's defaults and clipping at norm 1 in both, as in `StageConfig`."""


def find(name: str, variant: Variant) -> PaperStage:
    """Raises `ValueError` for a stage that the variant does not have."""
    stages = STAGES[variant]
    if name not in stages:
        raise ValueError(
            f"variant {variant!r} has no {name}: the original program trains its halves one by one "
            "(stage1_comprehension, stage1_creation) and merges them"
        )
    return stages[name]
