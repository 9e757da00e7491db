"""What a run is: stages over one model, each with its data, its trainable parameters and its optimiser settings."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dreamllm.data import Part
from dreamllm.model import PARAMETER_GROUPS, RECOMPUTE, Recompute

StageKind = Literal["stage1_comprehension", "stage1_creation", "stage1", "stage2", "stage3"]
Precision = Literal["float32", "bfloat16", "pure_bfloat16"]
Sharding = Literal["none", "full", "grad_op", "hybrid"]
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
class LoraSettings:
    """Adapters of low rank (Hu et al. 2021) in the decoder's layers: W x + alpha / rank * B A x, with W frozen.

    Attributes:
        rank: of the products B A.
        alpha: their scale, divided by the rank.
        dropout: of what the adapters read.
        targets: the projections that get one, by their last name.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank must be at least 1", "lora", self.rank)
        _require(self.alpha > 0, "alpha must be positive", "lora", self.alpha)
        _require(0 <= self.dropout < 1, "dropout must be in [0, 1)", "lora", self.dropout)
        _require(len(self.targets) > 0, "targets must name a projection", "lora", self.targets)


@dataclass(frozen=True)
class EmaSettings:
    """An average of the trained parameters over the steps of a stage.

    Attributes:
        decay: share of the average that stays in a step.
        warmup: smaller at first: step t (from 1) keeps at most (1 + t) / (10 + t).
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "decay must be in [0, 1)", "ema", self.decay)

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@dataclass(frozen=True)
class StageConfig:
    """One stage.

    What
        `name`: of its folder and in messages, unique in the run. `kind`: row of the stage table. `data`: the mixture.
    How much
        `steps`: optimiser steps. `micro_batches`: forward and backward passes that share a step, over all processes:
        their number must divide it, and each runs its share one after the other. Losses are averaged over all tokens
        and all pictures of the step. Every micro-batch has documents and random numbers of its own, so the number of
        processes changes speed and memory, not the result beyond rounding. A micro-batch holds either its share of
        `documents_per_step` documents, or at most `tokens_per_batch` tokens and `pictures_per_batch` pictures to create
        (None: any), chosen from `look_ahead` documents so that it is full.
    Optimiser (AdamW)
        `learning_rate`: the peak; linear warm-up over `warmup_ratio` of the steps, then cosine to 0. `weight_decay`,
        `betas`, `eps`. `max_grad_norm`: gradients are clipped to this norm.
    Losses
        `trainable`, `loss_weight_lm`, `loss_weight_vm`: None takes the stage table's. `loss_scale`, `snr_gamma`,
        `noise_offset`, `input_perturbation`, `condition_dropout`: as in `DreamLLMConfig`.
    Adapters
        `lora`: the decoder's layers keep their weights and adapters train in their place; all else trains as
        `trainable` says. The stage's model has them merged; alone they are in the stage's subfolder adapter.
    Data
        `flip_targets`: mirror half of the pictures to create (the original does).

    Raises `ValueError` for values outside their range.
    """

    name: str
    kind: StageKind
    data: tuple[Part, ...]
    steps: int
    _: KW_ONLY
    learning_rate: float
    documents_per_step: int | None = None
    tokens_per_batch: int | None = None
    look_ahead: int = 64
    pictures_per_batch: int | None = None
    micro_batches: int = 1
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
    lora: LoraSettings | None = None

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
        for name in ("steps", "micro_batches", "look_ahead"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", self.name, getattr(self, name))
        for name in ("documents_per_step", "tokens_per_batch", "pictures_per_batch"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1", self.name, value)
        if (self.documents_per_step is None) == (self.tokens_per_batch is None):
            raise ValueError(
                f"stage {self.name}: give either documents_per_step or tokens_per_batch; given: "
                f"{self.documents_per_step} and {self.tokens_per_batch}"
            )
        if self.pictures_per_batch is not None and self.tokens_per_batch is None:
            raise ValueError(f"stage {self.name}: pictures_per_batch belongs to tokens_per_batch, which is not given")
        if self.documents_per_step is not None and self.documents_per_step % self.micro_batches:
            raise ValueError(
                f"stage {self.name}: micro_batches {self.micro_batches} must divide documents_per_step "
                f"{self.documents_per_step}"
            )
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio must be in [0, 1]", self.name, self.warmup_ratio)
        _require(self.learning_rate > 0, "learning_rate must be positive", self.name, self.learning_rate)
        _require(self.max_grad_norm > 0, "max_grad_norm must be positive", self.name, self.max_grad_norm)
        dropout = self.condition_dropout
        _require(0 <= dropout < 1, "condition_dropout must be in [0, 1)", self.name, dropout)
        _require(self.loss_scale in ("none", "l1_norm", "l2_norm"), "unknown loss_scale", self.name, self.loss_scale)
        if self.lora is not None and "language_model" not in self.groups:
            raise ValueError(f"stage {self.name}: lora adapts the language_model, which is not among what trains")
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
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("data", "lora")}
        lora = None if self.lora is None else asdict(self.lora)
        return {**values, "lora": lora, "data": [part.describe() for part in self.data]}


@dataclass(frozen=True)
class RunSettings:
    """How a run proceeds on this machine.

    Attributes:
        precision: "float32"; "bfloat16" computes in it and keeps parameters and optimiser in float32 (in one process by
            autocast; sharded, weights are gathered in bfloat16, frozen parts are held in it, and gradients are added up
            in float32); "pure_bfloat16" also keeps parameters and optimiser in it, as the original program does.
        device: "auto" is CUDA when there is one.
        sharding: how the trained parameters, gradients and moments are spread over the processes of torchrun (FSDP2).
            "none": every process holds all; "full": spread over all, weights gathered layer by layer; "grad_op": the
            same, but weights stay gathered from forward to backward; "hybrid": spread within groups of `shard_size`.
        shard_size: processes in a group of "hybrid"; None: those of one node.
        shard_frozen_above_mib: frozen parts (the decoder's layers, vision model, UNet, VAE) that take more than so many
            MiB are spread in the same way: less memory, and more traffic in every micro-batch. Stage I's creation half
            then runs the language model with autograd throughout. None: frozen parts are whole everywhere.
        reduce_each_lane: gradients are added up over the processes after every micro-batch, not once a step: more
            traffic, but no process holds a whole gradient.
        compile_layers: the decoder's layers run through torch.compile, each by itself.
        fused_operators: the language model runs dreamkernels' operators; False: transformers' own code.
        recompute_layers: what the decoder's layers compute again for the gradient: "none", "selective" (everything but
            the attention), "full", or "auto": "selective" where the language model is trained, otherwise "none".
        pictures_per_pass: the most pictures that go through VAE and UNet together; None: all of a batch. These two
            change memory and time, and the result by rounding. See `DreamLLM.use_less_memory`.
        num_threads: CPU threads of torch; None leaves torch's choice.
        workers: processes that prepare batches; 0 prepares them in the training process.
        latents: folder of a latent cache (dreamllm data encode-latents), from which pictures to create are drawn as the
            VAE would give them, to rounding; None: the VAE runs in every step.
        missing_latents: what follows when the cache lacks a picture: an "error", or the VAE "encode"s it.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many checkpoints of a stage are kept while it runs.
        keep_every: checkpoints of steps that this divides are kept for good, also when the stage is complete.
        save_in_background: checkpoints are copied to host memory and written while training goes on.
        on_nonfinite: what follows when a loss or gradient is not finite: "stop" with the batch stored, or "skip" the
            step's update.
        max_consecutive_skips: steps skipped in a row after which the run stops after all.
        ema: keeps an average of the trained parameters over the steps, in float32: in checkpoints, and at the end as a
            model folder beside the stage's, with -ema after its name. None: none.
        keep_stage_models: keep each stage's model folder, or only the last.
        log_every: steps per line of metrics; values are means over them.
        max_bad_fraction: tolerated share of unusable samples, judged from the hundredth sample of a stage on.
        max_consecutive_bad: unusable samples in a row after which the run stops.

    Raises `ValueError` for values outside their range.
    """

    precision: Precision = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharding: Sharding = "none"
    shard_size: int | None = None
    shard_frozen_above_mib: int | None = None
    reduce_each_lane: bool = False
    compile_layers: bool = False
    fused_operators: bool = True
    recompute_layers: Recompute = "auto"
    pictures_per_pass: int | None = None
    num_threads: int | None = None
    workers: int = 0
    latents: Path | None = None
    missing_latents: Literal["error", "encode"] = "error"
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int | None = None
    save_in_background: bool = True
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_consecutive_skips: int = 10
    ema: EmaSettings | None = None
    keep_stage_models: bool = True
    log_every: int = 10
    max_bad_fraction: float = 0.1
    max_consecutive_bad: int = 20

    def __post_init__(self) -> None:
        choices = {"precision": get_args(Precision), "device": ("auto", "cpu", "cuda"), "sharding": get_args(Sharding)}
        choices["recompute_layers"] = RECOMPUTE
        choices["on_nonfinite"] = ("stop", "skip")
        choices["missing_latents"] = ("error", "encode")
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
        for name in (
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "max_consecutive_bad",
            "max_consecutive_skips",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", "settings", getattr(self, name))
        for name in ("pictures_per_pass", "num_threads", "shard_size", "keep_every"):
            if getattr(self, name) is not None:
                _require(getattr(self, name) >= 1, f"{name} must be at least 1", "settings", getattr(self, name))
        if self.shard_size is not None and self.sharding != "hybrid":
            raise ValueError(f"shard_size belongs to sharding 'hybrid', not to {self.sharding!r}")
        above = self.shard_frozen_above_mib
        if above is not None:
            _require(above >= 0, "shard_frozen_above_mib must not be negative", "settings", above)
            if self.sharding == "none":
                raise ValueError("shard_frozen_above_mib belongs to a sharding, but sharding is 'none'")
        _require(self.workers >= 0, "workers must not be negative", "settings", self.workers)
        bad = self.max_bad_fraction
        _require(0 <= bad <= 1, "max_bad_fraction must be in [0, 1]", "settings", bad)


FREE_TO_CHANGE = (
    "workers",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_stage_models",
    "save_in_background",
    "sharding",
    "shard_size",
    "shard_frozen_above_mib",
    "reduce_each_lane",
)
"""Settings that a run may be resumed with differently: they, and the number of processes, do not touch its result
beyond the order in which gradients are added up."""


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
        latents = self.settings.latents
        return {
            "model": str(model.relative_to(self.out.absolute()) if inside else model),
            "seed": self.seed,
            "settings": asdict(self.settings) | {"latents": None if latents is None else str(latents)},
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
