"""What a run is: stages over one model, each with its data, its trainable parameters and its optimiser settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dreamllm.data import Part
from dreamllm.model import PARAMETER_GROUPS

StageKind = Literal["stage1_comprehension", "stage1_creation", "stage1", "stage2", "stage3"]
Precision = Literal["float32", "bfloat16"]
LossScale = Literal["none", "l1_norm", "l2_norm"]

_JOINTS = ("visual_projector", "dream_queries", "condition_projector")
_LANGUAGE = ("language_model", "embeddings", "lm_head")

STAGE_TRAINABLE: dict[str, tuple[str, ...]] = {
    "stage1_comprehension": ("visual_projector",),
    "stage1_creation": ("dream_queries", "condition_projector"),
    "stage1": _JOINTS,
    "stage2": (*_LANGUAGE, *_JOINTS),
    "stage3": (*_LANGUAGE, *_JOINTS),
}
"""The parameter groups that each kind of stage trains (spec section D.1). Vision encoder, VAE and UNet never train."""

STAGE_LOSS_WEIGHTS: dict[str, tuple[float, float]] = {
    "stage1_comprehension": (1.0, 0.0),
    "stage1_creation": (0.0, 1.0),
    "stage1": (1.0, 1.0),
    "stage2": (1.0, 10.0),
    "stage3": (1.0, 10.0),
}
"""Weights of the language and the diffusion loss (spec section D.1). The halves of stage I do not interact."""


@dataclass(frozen=True)
class StageConfig:
    """One stage.

    What
        `name`: of its folder and in messages, unique in the run. `kind`: row of the stage table. `data`: the mixture.
    How much
        `steps`: optimiser steps. `documents_per_step`: documents per step. `accumulation`: forward and backward passes
        that share a step (must divide `documents_per_step`); losses are averaged over all tokens and all pictures of
        the step, so it changes memory, not the result beyond rounding.
    Optimiser (AdamW)
        `learning_rate`: the peak; linear warm-up over `warmup_ratio` of the steps, then cosine to 0. `weight_decay`,
        `betas`, `eps`. `max_grad_norm`: gradients are clipped to this norm.
    Losses
        `trainable`, `loss_weight_lm`, `loss_weight_vm`: None takes the stage table's. `loss_scale`, `snr_gamma`,
        `noise_offset`, `input_perturbation`, `condition_dropout`: as in `DreamLLMConfig`.
    Data
        `flip_targets`: mirror half of the pictures to create (the original does).

    Raises `ValueError` for values outside their range.
    """

    name: str
    kind: StageKind
    data: tuple[Part, ...]
    steps: int
    documents_per_step: int
    learning_rate: float
    accumulation: int = 1
    warmup_ratio: float = 0.003
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    trainable: tuple[str, ...] | None = None
    loss_weight_lm: float | None = None
    loss_weight_vm: float | None = None
    loss_scale: LossScale = "none"
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    condition_dropout: float = 0.0
    flip_targets: bool = False

    def __post_init__(self) -> None:
        if self.kind not in STAGE_TRAINABLE:
            raise ValueError(f"stage kind {self.kind!r} is unknown; known: {', '.join(STAGE_TRAINABLE)}")
        w_lm, w_vm = STAGE_LOSS_WEIGHTS[self.kind]
        self._default("trainable", STAGE_TRAINABLE[self.kind])
        self._default("loss_weight_lm", w_lm)
        self._default("loss_weight_vm", w_vm)
        self._check()

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        if not self.name or "/" in self.name or self.name in ("model", ".", ".."):
            raise ValueError(f"stage name {self.name!r} cannot be a folder of the run")
        for name in ("steps", "documents_per_step", "accumulation"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", self.name, getattr(self, name))
        if self.documents_per_step % self.accumulation:
            raise ValueError(
                f"stage {self.name}: accumulation {self.accumulation} must divide documents_per_step "
                f"{self.documents_per_step}"
            )
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio must be in [0, 1]", self.name, self.warmup_ratio)
        _require(self.learning_rate > 0, "learning_rate must be positive", self.name, self.learning_rate)
        _require(self.max_grad_norm > 0, "max_grad_norm must be positive", self.name, self.max_grad_norm)
        dropout = self.condition_dropout
        _require(0 <= dropout < 1, "condition_dropout must be in [0, 1)", self.name, dropout)
        _require(self.loss_scale in ("none", "l1_norm", "l2_norm"), "unknown loss_scale", self.name, self.loss_scale)
        unknown = self.groups - set(PARAMETER_GROUPS)
        _require(not unknown, f"trainable groups must be among {', '.join(PARAMETER_GROUPS)}", self.name, unknown)

    @property
    def groups(self) -> set[str]:
        """The parameter groups that train."""
        return set(self.trainable or ())

    @property
    def weights(self) -> tuple[float, float]:
        """What the language and the diffusion loss are multiplied with, the loss scale included (spec A.9)."""
        w_lm, w_vm = self.loss_weight_lm, self.loss_weight_vm
        assert w_lm is not None
        assert w_vm is not None
        scale = {"none": 1.0, "l1_norm": w_lm + w_vm, "l2_norm": math.hypot(w_lm, w_vm)}[self.loss_scale]
        return w_lm / scale, w_vm / scale

    def describe(self) -> dict[str, Any]:
        """All fields as JSON values; readers by what identifies them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "data"}
        return {**values, "data": [part.describe() for part in self.data]}


@dataclass(frozen=True)
class RunSettings:
    """How a run proceeds on this machine.

    Attributes:
        precision: "float32", or "bfloat16" (autocast; parameters and optimiser stay float32).
        device: "auto" is CUDA when there is one.
        fused_operators: the language model runs dreamkernels' operators; False: transformers' own code.
        recompute_layers: the decoder's layers keep only their input and are computed again for the gradient.
        pictures_per_pass: pictures that go through VAE and UNet together; None: all of a batch. These two change
            memory and time, and the result by rounding.
        num_threads: CPU threads of torch; None leaves torch's choice.
        workers: processes that prepare batches; 0 prepares them in the training process.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many checkpoints of a stage are kept while it runs.
        keep_stage_models: keep each stage's model folder, or only the last.
        log_every: steps per line of metrics; values are means over them.
        max_bad_fraction: tolerated share of unusable samples, judged from the hundredth sample of a stage on.
        max_consecutive_bad: unusable samples in a row after which the run stops.

    Raises `ValueError` for values outside their range.
    """

    precision: Precision = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fused_operators: bool = True
    recompute_layers: bool = False
    pictures_per_pass: int | None = None
    num_threads: int | None = None
    workers: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_stage_models: bool = True
    log_every: int = 10
    max_bad_fraction: float = 0.1
    max_consecutive_bad: int = 20

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', not {self.precision!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', not {self.device!r}")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every", "max_consecutive_bad"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", "settings", getattr(self, name))
        _require(self.workers >= 0, "workers must not be negative", "settings", self.workers)
        if self.pictures_per_pass is not None:
            _require(
                self.pictures_per_pass >= 1, "pictures_per_pass must be at least 1", "settings", self.pictures_per_pass
            )
        if self.num_threads is not None:
            _require(self.num_threads >= 1, "num_threads must be at least 1", "settings", self.num_threads)
        bad = self.max_bad_fraction
        _require(0 <= bad <= 1, "max_bad_fraction must be in [0, 1]", "settings", bad)


FREE_TO_CHANGE = ("workers", "checkpoint_every", "keep_checkpoints", "keep_stage_models")
"""Settings that a run may be resumed with differently: they do not touch its result."""


@dataclass(frozen=True)
class RunConfig:
    """A complete run: from the model folder `model`, through `stages` in order, into the folder `out`.

    The result is a function of this configuration: rerunning it resumes where it stopped and ends with the same bits.
    """

    model: Path
    stages: tuple[StageConfig, ...]
    out: Path
    seed: int = 42
    settings: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("a run needs at least one stage")
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {', '.join(names)}")

    def describe(self) -> dict[str, Any]:
        """The resolved configuration as JSON values. A model inside `out` is named relative to it."""
        model = self.model.absolute()
        inside = model.is_relative_to(self.out.absolute())
        return {
            "model": str(model.relative_to(self.out.absolute()) if inside else model),
            "seed": self.seed,
            "settings": asdict(self.settings),
            "stages": [stage.describe() for stage in self.stages],
        }


def learning_rate(stage: StageConfig, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up from 0, then half a cosine to 0, as in the original."""
    warmup = math.ceil(stage.steps * stage.warmup_ratio)
    if step < warmup:
        return stage.learning_rate * step / warmup
    progress = (step - warmup) / max(1, stage.steps - warmup)
    return stage.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def _require(condition: bool, message: str, where: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{where}: {message}, not {value!r}")
