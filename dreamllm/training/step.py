"""One optimiser step, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dreamllm.documents import PackedBatch
from dreamllm.model import DreamLLM
from dreamllm.training.configuration import StageConfig
from dreamllm.training.metrics import StepCounts

_FROZEN_ALWAYS = ("vision_model", "unet", "vae")


def prepare_model(model: DreamLLM, stage: StageConfig) -> list[nn.Parameter]:
    """Sets what trains, the modes of the parts and the loss options of `stage`; returns the trained parameters.

    Their gradients exist from the start, as zeros: a parameter that a batch does not reach then gets the same update
    in a resumed run as in one that was never interrupted.
    """
    model.set_trainable(stage.groups)
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


def train_step(
    model: DreamLLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    stage: StageConfig,
    generator: torch.Generator,
    autocast: AbstractContextManager,
) -> Tensor:
    """Forward and backward over `batches`, clip, update. Returns float32 [4] on the device.

    The four are the language loss and the diffusion loss (unweighted; means over all tokens and all pictures of the
    step), the total, and the gradient norm before clipping. `generator` draws the diffusion's random numbers. Raises
    `ValueError` when nothing in the batches reaches a trained parameter.
    """
    counts = count(batches)
    w_lm, w_vm = stage.weights
    optimizer.zero_grad(set_to_none=False)
    device = batches[0].input_ids.device
    sums = torch.zeros(3, device=device)
    reached = False
    for batch in batches:
        with autocast:
            output = model.forward_packed(batch, generator)
        lm, vm = output.lm_loss, output.vm_loss  # one that was not computed counts as 0
        lm = sums.new_zeros(()) if lm is None else lm * (batch.loss_targets.numel() / max(1, counts.targets))
        vm = lm.new_zeros(()) if vm is None else vm * (batch.dream_positions.shape[0] / counts.pictures)
        # A loss of weight zero is left out, not multiplied: zero times infinity would poison the rest.
        total = torch.stack([lm.new_zeros(()), *(w * part for w, part in ((w_lm, lm), (w_vm, vm)) if w)]).sum()
        if total.requires_grad:
            reached = True
            total.backward()
        sums += torch.stack([lm, vm, total]).detach()
    if not reached:
        raise ValueError(_unreached(stage, batches))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
    optimizer.step()
    return torch.cat([sums, grad_norm[None].to(sums)])


def count(batches: Sequence[PackedBatch]) -> StepCounts:
    return StepCounts(
        tokens=sum(batch.num_tokens for batch in batches),
        targets=sum(batch.loss_targets.numel() for batch in batches),
        pictures=sum(batch.dream_positions.shape[0] for batch in batches),
        documents=sum(batch.num_documents for batch in batches),
    )


def _unreached(stage: StageConfig, batches: Sequence[PackedBatch]) -> str:
    names = [name for batch in batches for name in batch.names]
    shown = f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    return (
        f"stage {stage.name} trains {', '.join(sorted(stage.groups))} with loss weights {stage.loss_weight_lm:g} "
        f"(language) and {stage.loss_weight_vm:g} (diffusion), but no document of the step reaches them "
        f"({shown}); give the stage data of the matching mode or more documents per step"
    )
