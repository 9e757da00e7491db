"""Text to image as the original's pipeline does it (spec F.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from benchmarks.original_pattern.model import OriginalPattern


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], padded on the left as in the original's evaluation."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (longest - len(p)), *p] for p in prompts], device=device)
    mask = torch.tensor([[*[0] * (longest - len(p)), *[1] * len(p)] for p in prompts], device=device)
    return ids, mask


def dream_states(model: OriginalPattern, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """States at the queries after prompts [B, T], [B, Q, H]: one pass for the text, one for the queries."""
    cache = model(input_ids, attention_mask, use_cache=True).past_key_values
    layout, rows = model.layout, len(input_ids)
    marks = torch.tensor([[layout.dream_start, layout.dream_end]], device=input_ids.device)
    start, end = model.model.embed_tokens(marks.repeat(rows, 1)).split(1, dim=1)
    embeds = torch.cat([start, model.dream_queries.repeat(rows, 1, 1), end], dim=1)
    mask = torch.cat([attention_mask, attention_mask.new_ones(embeds.shape[:2])], dim=1)
    outputs = model(
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    return outputs.hidden_states[-1][:, 1:-1]


def denoise(
    model: OriginalPattern,
    condition: Tensor,
    negative: Tensor,
    steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
) -> Tensor:
    """Latents [B, 4, h, w] after guided DDPM steps."""
    condition = torch.cat([negative, condition])
    device = condition.device
    side = model.unet.config.sample_size
    shape = (len(generators), model.unet.config.in_channels, side, side)
    model.scheduler.set_timesteps(steps, device=device)
    # Latents and noise in float32, whatever the dtype, so that both programs draw the same noise.
    latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    latents = latents * model.scheduler.init_noise_sigma
    for timestep in model.scheduler.timesteps:
        both = model.scheduler.scale_model_input(torch.cat([latents] * 2), timestep).to(condition.dtype)
        unconditional, conditional = model.unet(both, timestep, encoder_hidden_states=condition).sample.float().chunk(2)
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        latents = model.scheduler.step(predicted, timestep, latents, generator=generators).prev_sample
    return latents


@torch.no_grad()
def draw(
    model: OriginalPattern,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    steps: int = 50,
    guidance_scale: float = 7.5,
) -> list[Image.Image]:
    """One picture per prompt (ids with the begin token)."""
    pixels = draw_pixels(model, prompts, seeds, steps, guidance_scale).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in pixels]


@torch.no_grad()
def draw_pixels(
    model: OriginalPattern,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """The pictures of `draw` in [0, 1], float32 [B, 3, H, W].

    One noise generator per picture, where the original has one per batch: a picture then does not depend on what else
    is drawn, and can be compared.
    """
    ids, mask = pad_left(prompts, model.layout.pad, model.device)
    empty = torch.full((len(prompts), 1), model.layout.bos, device=model.device)
    states = dream_states(model, ids, mask)
    negative = dream_states(model, empty, torch.ones_like(empty))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = denoise(
        model, model.condition_projector(states), model.condition_projector(negative), steps, guidance_scale, generators
    )
    pictures = model.vae.decode((latents / model.vae.config.scaling_factor).to(model.vae.dtype)).sample
    return (pictures.float() / 2 + 0.5).clamp(0, 1)
