"""What the parts of a DreamLLM cost, in floating-point operations, and their shares of one image-text pair.

The shares say whether a small model stands for the 7b: `mini` is made so that CLIP, the UNet and the VAE cost as many
language-model tokens per picture as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel, LlamaForCausalLM

from dreamllm.workloads import model_config, model_size

CAPTION_TOKENS = 55  # at 7b


@dataclass(frozen=True)
class Costs:
    """Floating-point operations, forward: one token of a pair, one picture through CLIP, one UNet call, the VAE."""

    token: float
    clip: float
    unet: float
    vae_encode: float
    vae_decode: float

    def share_of_pair(self, size: str) -> dict[str, float]:
        """Shares of one image-text pair, read and drawn: its tokens, CLIP, one UNet call, one VAE encoding."""
        parts = {
            "language model": self.token * pair_tokens(size),
            "clip": self.clip,
            "unet": self.unet,
            "vae": self.vae_encode,
        }
        total = sum(parts.values())
        return {name: part / total for name, part in parts.items()}


def pair_tokens(size: str) -> int:
    """Positions of a picture read and drawn, with a caption."""
    config = model_config(size)
    caption = round(CAPTION_TOKENS * model_size(size).text_scale)
    return caption + config.tokens_per_image + config.num_dream_queries + 6


def costs(size: str) -> Costs:
    """Counts on the meta device, on the libraries' own modules."""
    config = model_config(size)
    tokens = pair_tokens(size)
    side, pixels = config.unet_config["sample_size"], config.picture_size
    with torch.device("meta"):
        llama = LlamaForCausalLM(config.text_config)
        clip = CLIPVisionModel(config.vision_config)
        unet = UNet2DConditionModel.from_config(config.unet_config)
        vae = AutoencoderKL.from_config(config.vae_config)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        image = torch.zeros(1, 3, config.vision_config.image_size, config.vision_config.image_size)
        latents, timestep = torch.zeros(1, 4, side, side), torch.zeros(1, dtype=torch.long)
        context = torch.zeros(1, config.num_dream_queries, config.condition_size)
        return Costs(
            # A ready mask, because transformers would look for one in the values of position_ids.
            token=_flops(lambda: llama(ids, torch.zeros(1, 1, tokens, tokens), use_cache=False)) / tokens,
            clip=_flops(lambda: clip(image)),
            unet=_flops(lambda: unet(latents, timestep, context)),
            vae_encode=_flops(lambda: vae.encode(torch.zeros(1, 3, pixels, pixels))),
            vae_decode=_flops(lambda: vae.decode(latents)),
        )


def _flops(call: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
