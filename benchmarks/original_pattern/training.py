"""A training step as the original takes it (spec A.9, D.2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original_pattern.collate import PaddedBatch
from benchmarks.original_pattern.model import OriginalPattern
from dreamllm.documents import IGNORE_INDEX
from dreamllm.training import StageConfig


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every position of float32 logits [B, T, V], then the mean over those with a label."""
    shifted = logits[:, :-1].contiguous()
    targets = labels[:, 1:].contiguous().flatten()
    errors = F.cross_entropy(shifted.flatten(0, 1), targets, reduction="none", ignore_index=IGNORE_INDEX)
    learned = targets != IGNORE_INDEX
    return errors[learned].mean() if learned.any() else errors.mean()


def diffusion_loss(model: OriginalPattern, contexts: Tensor, images_dm: Tensor, generator: torch.Generator) -> Tensor:
    """VAE encoding, noise, UNet, mean squared error in float32. contexts [M, Q, H], before the projector."""
    condition = model.condition_projector(contexts)
    device = images_dm.device
    with torch.no_grad():
        posterior = model.vae.encode(images_dm.to(model.vae.dtype)).latent_dist
        # Draws and noisy latents in float32, whatever the dtype, so that both programs see the same ones.
        drawn = torch.randn(posterior.mean.shape, generator=generator, device=device)
        latents = (posterior.mean + posterior.std * drawn) * model.vae.config.scaling_factor
    steps = model.scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(latents),), generator=generator, device=device)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = model.scheduler.add_noise(latents, noise, timesteps).to(model.unet.dtype)
    predicted = model.unet(noisy, timesteps, encoder_hidden_states=condition).sample
    return F.mse_loss(predicted.float(), noise.float(), reduction="mean")


def losses(model: OriginalPattern, batch: PaddedBatch, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """The language loss, and the diffusion loss where there are pictures to draw.

    `generator` draws posterior samples, time steps and noise, in dreamllm's order, which differs from the original's
    (noise before time steps) and does not matter for time or distribution.
    """
    outputs = model(
        batch.input_ids,
        batch.attention_mask,
        images=batch.images,
        with_queries=batch.images_dm is not None,
        use_cache=False,
    )
    lm_loss = language_loss(outputs.logits, batch.labels)
    if batch.images_dm is None:
        return lm_loss, None
    contexts = model.dream_contexts(outputs.hidden_states[-1], batch.input_ids, len(batch.images_dm))
    return lm_loss, diffusion_loss(model, contexts, batch.images_dm, generator)


class Trainer:
    """Stage `stage` on `model`: AdamW as transformers' trainer makes it, decoder layers checkpointed."""

    def __init__(
        self, model: OriginalPattern, stage: StageConfig, autocast: AbstractContextManager | None = None
    ) -> None:
        self.model, self.stage = model, stage
        self.autocast = autocast or nullcontext()
        for name, parameters in model.parameter_groups().items():
            for parameter in parameters:
                parameter.requires_grad_(name in stage.groups)
        model.train()
        for part in (model.clip, model.unet, model.vae):
            part.eval()
        # Of the decoder only: called on the whole it would also checkpoint the UNet, which the original does not.
        enable = getattr(model.model, "activation_checkpointing_enable", None)
        (enable or model.model.gradient_checkpointing_enable)()
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=stage.learning_rate,
            betas=stage.betas,
            eps=stage.eps,
            weight_decay=stage.weight_decay,
        )

    def step(self, batch: PaddedBatch, generator: torch.Generator) -> tuple[float, float, float, float]:
        """Language loss, diffusion loss (0 without pictures), their weighted sum, gradient norm before clipping."""
        found = self.gradients(batch, generator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def gradients(self, batch: PaddedBatch, generator: torch.Generator) -> tuple[float, float, float, float]:
        """`step` up to the update: leaves clipped gradients."""
        with self.autocast:
            lm_loss, vm_loss = losses(self.model, batch, generator)
        w_lm, w_vm = self.stage.weights
        total = w_lm * lm_loss + (0.0 if vm_loss is None else w_vm * vm_loss)
        logged = lm_loss.item(), 0.0 if vm_loss is None else vm_loss.item()  # the original's logging of each step
        total.backward()
        if torch.isnan(total).item() or torch.isinf(total).item():
            raise FloatingPointError(f"the loss is {total.item()}")
        norm = nn.utils.clip_grad_norm_(self.parameters, self.stage.max_grad_norm).item()
        return (*logged, total.item(), norm)
