"""How many operations a lane's passes need: the numerator of a run's share of its devices' peak.

A multiplication and an addition are two. Only products count (linear layers, attention, convolutions), and only what
the mathematics needs: nothing that is computed again to save memory, and half of the square for causal attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from dreamllm.documents import PackedBatch
from dreamllm.model import DreamLLM, DreamLLMConfig
from dreamllm.model.codec import build_codec


class StepOperations:
    """Operations of a batch in training `model`, whose `requires_grad` flags are set, with a weight of `lm` on the
    language loss. Nothing is run: the model's own parameters are only looked at for their shapes."""

    def __init__(self, model: DreamLLM, weight_lm: float) -> None:
        self.model, self.counts_text = model, bool(weight_lm)
        config, text = model.config, model.config.text_config
        groups = {name: any(p.requires_grad for p in of) for name, of in model.parameter_groups().items()}
        layers = list(model.decoder.layers)  # type: ignore[union-attr, arg-type]
        inputs = groups["embeddings"] or groups["dream_queries"] or groups["visual_projector"]
        # Forward, gradients of what a product reads, gradients of its weights.
        self.layer_passes = 1 + (inputs or groups["language_model"]) + groups["language_model"]
        self.attention_passes = 3 if inputs or groups["language_model"] else 1
        self.head_passes = 1 + (self.layer_passes > 1) + groups["lm_head"]
        self.layer = _linear(layers[0])
        self.after_attention = self.layer - sum(
            _linear(getattr(layers[0].self_attn, n)) for n in ("q_proj", "k_proj", "v_proj")
        )
        self.num_layers = len(layers)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.pair = 4 * text.num_attention_heads * head_dim * self.num_layers
        self.head = 2 * text.hidden_size * text.vocab_size
        self.query = _linear(model.condition_projector) * (2 + groups["condition_projector"])
        self.patches = config.layout().tokens_per_image
        trained = groups["visual_projector"]
        image, picture, self.encoded = _frozen_parts(config)
        self.image = image + self.patches * _linear(model.visual_projector) * (1 + trained)
        self.picture = 2 * picture  # and the gradient of the condition

    def of(self, batch: PackedBatch) -> int:
        """Of a batch on the host."""
        read = batch.dream_positions.numel() + (0 if batch.null_positions is None else batch.null_positions.numel())
        targets = batch.loss_targets.numel() if self.counts_text else 0
        if self.model.why_not_split(batch):
            lengths = batch.cu_seqlens.diff().double()
            pairs, tokens = self.attention_passes * _causal(lengths), self.layer_passes * batch.num_tokens
            unread = self.layer_passes * (batch.num_tokens - read - targets)
        else:  # the constant positions run forward only
            starts, firsts, ends = torch.tensor(batch.query_spans, dtype=torch.float64).T
            before, alone = _causal(ends - starts) - _causal(firsts - starts), _causal(firsts - starts)
            pairs = alone + self.attention_passes * before
            constant, dependent = float((firsts - starts).sum()), float((ends - firsts).sum())
            tokens = constant + self.layer_passes * dependent
            unread = constant + self.layer_passes * (dependent - read)
        total = self.num_layers * self.layer * tokens - self.after_attention * unread + self.pair * pairs
        total += self.head_passes * self.head * targets + self.query * read
        images = 0 if batch.pixel_values is None else batch.pixel_values.shape[0]
        encoded = 0 if batch.target_pixel_values is None else batch.target_pixel_values.shape[0]
        total += self.image * images + self.picture * batch.dream_positions.shape[0] + self.encoded * encoded
        return int(total)


def _causal(lengths: torch.Tensor) -> float:
    """Pairs of a query and a key."""
    return float((lengths * (lengths + 1)).sum() / 2)


def _linear(module: nn.Module) -> int:
    """Of one position through all linear layers."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _frozen_parts(config: DreamLLMConfig) -> tuple[int, int, int]:
    """Forward passes of one picture through vision model, UNet and the VAE's encoder, counted on the meta device."""
    side = config.vision_config.image_size
    with torch.device("meta"):
        vision: Any = AutoModel.from_config(config.vision_config)
        unet: Any = UNet2DConditionModel.from_config(config.unet_config)
        codec: Any = build_codec(config.vae_config)
        pixels = torch.empty(1, 3, side, side)
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        condition = torch.empty(1, config.num_dream_queries, config.condition_size)
        encoded = 0
        if isinstance(codec, AutoencoderKL):
            target = torch.empty(1, config.picture_channels, config.picture_size, config.picture_size)
            encoded = _counted(lambda: codec.encode(target))
        picture = _counted(lambda: unet(torch.empty(shape), torch.zeros(1, dtype=torch.int64), condition))
        return _counted(lambda: vision(pixels)), picture, encoded


def _counted(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops()
