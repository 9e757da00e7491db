"""Model sizes: the paper's, and two smaller ones of the same make that a processor can train."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dreamllm.documents.layout import SPECIAL_TOKENS
from dreamllm.model import DreamLLM, DreamLLMConfig, DreamLLMProcessor, ProcessorSettings
from dreamllm.model.processor import CLIPImageProcessorPil, add_special_tokens, special_token_ids

ORDINARY_TOKENS = ("<unk>", "<s>", "</s>")
ADDED_TOKENS = 1 + len(SPECIAL_TOKENS)
"""What DreamLLM adds to a tokenizer: padding and its markers."""


@dataclass(frozen=True)
class ModelSize:
    """A model by its components' configurations.

    `words`: the vocabulary without the added tokens. `text_scale` shortens all texts by this factor.
    `documents_per_step`: a step that takes a few seconds at most on two cores (tiny, mini), or the paper's batch per
    GPU (7b).
    """

    summary: str
    words: int
    max_length: int
    text_scale: float
    num_dream_queries: int
    text: dict[str, Any]
    vision: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    documents_per_step: int


def _text(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-6,
        **more,
    }


def _vision(hidden: int, layers: int, heads: int, image_size: int, patch_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def _unet(
    channels: tuple[int, ...], heads: tuple[int, ...], condition: int, sample: int, **more: Any
) -> dict[str, Any]:
    """Cross-attention in every block but the lowest, as in Stable Diffusion."""
    crossed = len(channels) - 1
    return {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": sample,
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        "layers_per_block": 2,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "cross_attention_dim": condition,
        "use_linear_projection": True,
        **more,
    }


def _vae(channels: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        **more,
    }


SIZES: dict[str, ModelSize] = {
    "tiny": ModelSize(
        "for tests: 4 image tokens, 4 queries, contexts of 128 tokens, 16-pixel pictures",
        words=88,
        max_length=128,
        text_scale=0.1,
        num_dream_queries=4,
        text=_text(32, 88, 2, 2, initializer_range=0.3),  # wide: the likeliest tokens stay apart
        vision=_vision(16, 3, 2, image_size=16, patch_size=8),
        unet=_unet((8, 16), (1, 2), condition=16, sample=8, layers_per_block=1, norm_num_groups=4),
        vae=_vae((4, 8), norm_num_groups=2),
        documents_per_step=4,
    ),
    "mini": ModelSize(
        "for measurements on a processor: the 7b in proportion, every count of tokens a quarter",
        words=760,
        max_length=512,
        text_scale=0.25,
        num_dream_queries=16,
        text=_text(256, 688, 6, 4, initializer_range=0.1),
        vision=_vision(64, 5, 2, image_size=32, patch_size=4),
        unet=_unet((24, 48, 96, 96), (1, 2, 4, 4), condition=64, sample=16, layers_per_block=1, norm_num_groups=8),
        vae=_vae((8, 16, 32, 32), norm_num_groups=4),
        documents_per_step=8,
    ),
    "7b": ModelSize(
        "the paper's: Vicuna-7B, CLIP ViT-L/14, Stable Diffusion 2.1-base",
        words=32000,
        max_length=2048,
        text_scale=1.0,
        num_dream_queries=64,
        text=_text(4096, 11008, 32, 32),
        vision=_vision(1024, 24, 16, image_size=224, patch_size=14),
        unet=_unet((320, 640, 1280, 1280), (5, 10, 20, 20), condition=1024, sample=64),
        vae=_vae((128, 256, 512, 512)),
        documents_per_step=8,
    ),
}
"""`mini` keeps what decides where the time goes: documents of a quarter of the length hold as many pictures as at 7b,
and one picture through CLIP, the UNet or the VAE costs as many language-model tokens as there: 68, 2, 12 and 18% of a
pair that is read and drawn, beside 71, 2, 11 and 16% (benchmarks/models/costs.py)."""

_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
}


def model_size(name: str) -> ModelSize:
    """Looks a size up. Raises `ValueError` listing the known ones."""
    if name in SIZES:
        return SIZES[name]
    near = difflib.get_close_matches(name, SIZES, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    known = "".join(f"\n  {known}: {size.summary}" for known, size in SIZES.items())
    raise ValueError(f"unknown size {name!r}.{meant} Known sizes:{known}")


def model_config(name: str, layers: int | None = None, **changes: Any) -> DreamLLMConfig:
    """The configuration of size `name`; `changes` are further `DreamLLMConfig` fields.

    `layers`: of the decoder, where not as many as the size has. Raises `ValueError` for fewer than one.
    """
    size = model_size(name)
    if layers is not None and layers < 1:
        raise ValueError(f"a decoder has at least 1 layer, not {layers}")
    return DreamLLMConfig(
        text_config={
            **size.text,
            **({} if layers is None else {"num_hidden_layers": layers}),
            "vocab_size": size.words + ADDED_TOKENS,
            "max_position_embeddings": size.max_length,
            "tie_word_embeddings": False,
        },
        vision_config={**size.vision, "hidden_act": "quick_gelu"},
        unet_config=dict(size.unet),
        vae_config=dict(size.vae),
        scheduler_config=dict(_SCHEDULER),
        token_ids=special_token_ids(make_tokenizer(size)),
        num_dream_queries=size.num_dream_queries,
        max_sequence_length=size.max_length,
        **changes,
    )


@contextmanager
def made_with(seed: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Modules made inside get random weights that follow from `seed`, made where and as what they are to be.

    A 7b then never exists in float32 or in the host's memory. None: PyTorch's own defaults.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.random.fork_rng(), nullcontext() if device is None else torch.device(device):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def make_model(
    name: str,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    **changes: Any,
) -> DreamLLM:
    """A model of size `name` with random weights that follow from `seed`; see `made_with` and `model_config`."""
    with made_with(seed, device, dtype):
        return DreamLLM(model_config(name, layers, **changes))


def make_tokenizer(size: ModelSize) -> PreTrainedTokenizerFast:
    """A tokenizer whose ordinary tokens are words: `w17` has id 17. Other words are unknown."""
    words = [*ORDINARY_TOKENS, *(f"w{i}" for i in range(len(ORDINARY_TOKENS), size.words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=ORDINARY_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, begin, end = ORDINARY_TOKENS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end, model_max_length=size.max_length
    )
    assert add_special_tokens(wrapped) == ADDED_TOKENS
    return wrapped


def make_processor(name: str) -> DreamLLMProcessor:
    """The processor of size `name`, over `make_tokenizer`'s words."""
    size, config = model_size(name), model_config(name)
    side = size.vision["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return DreamLLMProcessor(images, make_tokenizer(size), ProcessorSettings.from_config(config))
