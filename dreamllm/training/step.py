"""One optimiser step, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dreamllm.documents import PackedBatch
from dreamllm.model import DreamLLM
from dreamllm.training.configuration import StageConfig
from dreamllm.training.lora import train_adapters_only
from dreamllm.training.metrics import StepCounts

_FROZEN_ALWAYS = ("vision_model", "unet", "vae")


def prepare_model(model: DreamLLM, stage: StageConfig) -> list[nn.Parameter]:
    """Sets what trains, the modes of the parts and the loss options of `stage`; returns the trained parameters.

    Their gradients exist from the start, as zeros, so that an optimiser can make its state.
    """
    model.set_trainable(stage.groups)
    if stage.lora is not None:
        train_adapters_only(model)
    model.train()
    for part in _FROZEN_ALWAYS:
        getattr(model, part).eval()
    options = model.config
    options.loss_weight_lm, options.loss_weight_vm = stage.loss_weight_lm, stage.loss_weight_vm
    options.loss_scale_schedule, options.snr_gamma = stage.loss_scale, stage.snr_gamma
    options.noise_offset, options.input_perturbation = stage.noise_offset, stage.input_perturbation
    options.condition_dropout = stage.condition_dropout
    trained = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        if parameter.requires_grad:
            trained.append(parameter)
    return trained


def make_optimizer(parameters: Sequence[nn.Parameter], stage: StageConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=stage.learning_rate,
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        fused=True,
    )


class Pass:
    """How a lane (one of the micro-batches of a step) runs, and how results of all processes come together.

    This one is for a model that is whole in a single process; `sharding.ShardedModel` is the other.
    """

    keeps_gradients = True
    """Whether gradients stay whole until the next step, and a parameter that no lane reaches has one of zero."""

    def __init__(self, model: DreamLLM, stage: StageConfig, autocast: AbstractContextManager | None = None) -> None:
        self.model, self.stage, self.autocast = model, stage, autocast or nullcontext()

    def run(
        self, batch: PackedBatch, counts: StepCounts, generator: torch.Generator, last: bool
    ) -> tuple[Tensor, Tensor]:
        """The lane's part of the step's loss, for its backward pass, and [3] its language, diffusion and total loss.

        `counts`: of the whole step. `last`: no other lane of this process follows in this step.
        """
        return lane_loss(self.model, batch, counts, self.stage, generator, self.autocast)

    def whole(self) -> AbstractContextManager:
        """Inside, the model has all its weights in this process and can be run by anybody, without gradients."""
        return nullcontext()

    def sum(self, losses: Tensor) -> Tensor:
        """Adds up device tensors over all processes."""
        return losses


def lane_loss(
    model: DreamLLM,
    batch: PackedBatch,
    counts: StepCounts,
    stage: StageConfig,
    generator: torch.Generator,
    autocast: AbstractContextManager,
) -> tuple[Tensor, Tensor]:
    """What one lane adds to the step's loss, a float32 scalar; [3] its language, diffusion and total loss, detached.

    Means are over all tokens and all pictures of the step, which `counts` names.
    """
    with autocast:
        output = model.forward_packed(batch, generator)
    zero = torch.zeros((), device=batch.input_ids.device)
    w_lm, w_vm = stage.weights
    lm, vm = output.lm_loss, output.vm_loss  # one that was not computed counts as 0
    lm = zero if lm is None else lm * (batch.loss_targets.numel() / max(1, counts.targets))
    vm = zero if vm is None else vm * (batch.dream_positions.shape[0] / counts.pictures)
    # A loss of weight zero is left out, not multiplied: zero times infinity would poison the rest.
    total = torch.stack([zero, *(w * part for w, part in ((w_lm, lm), (w_vm, vm)) if w)]).sum()
    return total, torch.stack([lm, vm, total]).detach()


def train_step(
    model: DreamLLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    stage: StageConfig,
    generator: torch.Generator | Sequence[torch.Generator],
    autocast: AbstractContextManager | None = None,
) -> Tensor:
    """`run_step` of a model that is whole in this process. `generator`: one for all batches, or one for each."""
    generators = [generator] * len(batches) if isinstance(generator, torch.Generator) else generator
    return run_step(Pass(model, stage, autocast), optimizer, batches, generators, count(batches))


def run_step(
    through: Pass,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    generators: Sequence[torch.Generator],
    counts: StepCounts,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Forward and backward over the lanes of this process, clip, update. Returns float32 [4] on the device.

    The gradients of the step before make room for its activations. A parameter that no batch reaches has a gradient of
    zero: it then gets the same update in a resumed run as in one that was never interrupted.

    The four are the language loss and the diffusion loss (unweighted; means over all tokens and all pictures of the
    step, in all processes), the total, and the gradient norm before clipping. `generators` draw the diffusion's random
    numbers, one per lane. `counts`: of all lanes of all processes. `skip_nonfinite`: a step of which one of the four is
    not finite changes neither parameters nor moments; the device decides. Raises `ValueError` when nothing in the
    batches reaches a trained parameter.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(3, device=batches[0].input_ids.device)
    reached = False
    for i, (batch, generator) in enumerate(zip(batches, generators, strict=True)):
        torch.manual_seed(generator.initial_seed())  # for dropout, where a component has it
        total, parts = through.run(batch, counts, generator, last=i + 1 == len(batches))
        if total.requires_grad:
            reached = True
            total.backward()
        sums += parts
    if not reached:
        raise ValueError(unreached(through.stage, [name for batch in batches for name in batch.names]))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters if through.keeps_gradients else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grad_norm = clip(parameters, through.stage.max_grad_norm)
    losses = torch.cat([through.sum(sums), grad_norm[None].to(sums)])
    if skip_nonfinite:
        optimizer.found_inf = (~losses.isfinite().all()).float()  # type: ignore[attr-defined]  # as GradScaler does
    optimizer.step()
    return losses


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down to `max_norm`; returns their norm before, over all processes, on the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def count(batches: Sequence[PackedBatch]) -> StepCounts:
    return StepCounts(
        tokens=sum(batch.num_tokens for batch in batches),
        targets=sum(batch.loss_targets.numel() for batch in batches),
        pictures=sum(batch.dream_positions.shape[0] for batch in batches),
        documents=sum(batch.num_documents for batch in batches),
    )


def unreached(stage: StageConfig, names: Sequence[str]) -> str:
    """The message about a step of documents `names` that trains nothing."""
    return (
        f"stage {stage.name} trains {', '.join(sorted(stage.groups))} with loss weights {stage.loss_weight_lm:g} "
        f"(language) and {stage.loss_weight_vm:g} (diffusion), but no document of the step reaches them "
        f"({shown(names)}); give the stage data of the matching mode or more documents per step"
    )


def shown(names: Sequence[str]) -> str:
    """The first few of `names`."""
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
