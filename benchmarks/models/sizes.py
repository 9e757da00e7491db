"""The DreamLLM that the workloads run: `7b` as published, and small ones in its proportions.

`mini` keeps what decides where the time goes. Every count of tokens is a quarter (64 patches, 16 queries, context of
512), so documents of a quarter of the length hold the same number of pictures; and the cost of one CLIP picture, one
UNet call and one VAE encoding stands to the cost of as many language-model tokens as the picture takes as at 7B.
`share_of_pair` says how well: shares of the floating-point operations of one image-text pair that is read and drawn.
`tiny` is for tests and keeps no proportions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dreamllm.model import DreamLLM, DreamLLMConfig

TOKEN_NAMES = (
    "<unk>", "<s>", "</s>", "[PAD]", "<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>",
    "<dream_end>",
)  # fmt: skip
"""The first ids of the synthetic vocabulary; words follow."""

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""Spec A.7."""

_SD_BLOCKS = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "use_linear_projection": True,
}


@dataclass(frozen=True)
class Size:
    """Configurations of the components; `text_scale` shortens all texts by this factor."""

    name: str
    llama: dict[str, Any]
    clip: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    num_dream_queries: int
    text_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> DreamLLMConfig:
        """The configuration of the DreamLLM of this size."""
        names = ("bos", "eos", "pad", "im_start", "im_patch", "im_end", "dream_start", "dream_end")
        special = {"bos": "<s>", "eos": "</s>", "pad": "[PAD]"}
        return DreamLLMConfig(
            text_config=LlamaConfig(**self.llama),
            vision_config=CLIPVisionConfig(**self.clip),
            unet_config=dict(self.unet),
            vae_config=dict(self.vae),
            scheduler_config=dict(SCHEDULER),
            token_ids={name: TOKEN_NAMES.index(special.get(name, f"<{name}>")) for name in names},
            num_dream_queries=self.num_dream_queries,
            max_sequence_length=self.llama["max_position_embeddings"],
            **self.options,
        )


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary,
        "max_position_embeddings": context, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def _clip(hidden: int, layers: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": side, "patch_size": patch, "hidden_act": "quick_gelu",
    }  # fmt: skip


def _vae(widths: tuple[int, ...], groups: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths, "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths), "layers_per_block": 2, "latent_channels": 4,
        "norm_num_groups": groups, "scaling_factor": 0.18215,
    }  # fmt: skip


SIZES = {
    size.name: size
    for size in (
        Size(
            "tiny",
            # A wide initialisation keeps the likeliest tokens of a random model apart.
            {**_llama(32, 88, 2, 2, 96, 128), "initializer_range": 0.3},
            _clip(16, 3, 2, 16, 8),
            {
                "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "use_linear_projection": True,
                "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": (1, 2), "norm_num_groups": 4,
            },
            _vae((4, 8), 2),
            num_dream_queries=4,
            text_scale=0.1,
        ),
        Size(
            "mini",
            {**_llama(256, 688, 6, 4, 768, 512), "initializer_range": 0.1},
            _clip(64, 5, 2, 32, 4),
            {
                "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (24, 48, 96, 96),
                **_SD_BLOCKS,
                "layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": (1, 2, 4, 4),
                "norm_num_groups": 8,
            },
            _vae((8, 16, 32, 32), 4),
            num_dream_queries=16,
            text_scale=0.25,
        ),
        Size(
            "7b",
            _llama(4096, 11008, 32, 32, 32008, 2048),
            _clip(1024, 24, 16, 224, 14),
            {
                "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
                **_SD_BLOCKS,
                "layers_per_block": 2, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
            },
            _vae((128, 256, 512, 512), 32),
            num_dream_queries=64,
        ),
    )
}  # fmt: skip


def build(size: Size, device: str = "cpu", seed: int = 0) -> DreamLLM:
    """A random DreamLLM of this size; on "meta" without weights."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return DreamLLM(size.config()).eval()


@dataclass(frozen=True)
class Costs:
    """Floating-point operations, forward: one token of a pair, one picture through CLIP, one UNet call, the VAE."""

    token: float
    clip: float
    unet: float
    vae_encode: float
    vae_decode: float

    def share_of_pair(self, size: Size) -> dict[str, float]:
        """Shares of one image-text pair, read and drawn: its tokens, CLIP, one UNet call, one VAE encoding."""
        parts = {
            "language model": self.token * pair_tokens(size),
            "clip": self.clip,
            "unet": self.unet,
            "vae": self.vae_encode,
        }
        total = sum(parts.values())
        return {name: part / total for name, part in parts.items()}


def pair_tokens(size: Size) -> int:
    """Positions of a picture read and drawn, with a caption of 55 tokens at 7B."""
    config = size.config()
    return round(55 * size.text_scale) + config.tokens_per_image + size.num_dream_queries + 6


def costs(size: Size) -> Costs:
    """Counts on the meta device, on the libraries' own modules."""
    config = size.config()
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
        context = torch.zeros(1, size.num_dream_queries, config.condition_size)
        return Costs(
            # A ready mask, because transformers would look for one in the values of position_ids.
            token=_flops(lambda: llama(ids, torch.zeros(1, 1, tokens, tokens), use_cache=False)) / tokens,
            clip=_flops(lambda: clip(image)),
            unet=_flops(lambda: unet(latents, timestep, context)),
            vae_encode=_flops(lambda: vae.encode(torch.zeros(1, 3, pixels, pixels))),
            vae_decode=_flops(lambda: vae.decode(latents)),
        )


def _flops(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
