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
        flows = inputs or groups["language_model"]
        # Of a position: forward; with the gradients of what the products read and of the weights that train.
        self.forward, self.layer = _linear(layers[0]), _passes(layers[0], flows)
        read_before = [getattr(layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        self.forward_after = self.forward - sum(map(_linear, read_before))
        self.layer_after = self.layer - sum(_passes(part, flows) for part in read_before)
        self.attention_passes = 3 if flows else 1
        self.head_passes = 1 + flows + groups["lm_head"]
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
            pairs = self.attention_passes * _causal(batch.cu_seqlens.diff().double())
            before, tokens = 0.0, float(batch.num_tokens)
        else:  # what stands before the queries runs forward only, and nothing behind them
            starts, firsts, ends = torch.tensor(batch.query_spans, dtype=torch.float64).T
            alone = _causal(firsts - starts)
            pairs = alone + self.attention_passes * (_causal(ends - starts) - alone)
            before, tokens = float((firsts - starts).sum()), float((ends - firsts).sum())
        # The last layer computes what follows its attention only where a loss reads it.
        total = self.num_layers * (self.forward * before + self.layer * tokens) + self.pair * pairs
        total -= self.forward_after * before + self.layer_after * (tokens - read - targets)
        total += self.head_passes * self.head * targets + self.query * read
        images = 0 if batch.pixel_values is None else batch.pixel_values.shape[0]
        encoded = 0 if batch.target_pixel_values is None else batch.target_pixel_values.shape[0]
        total += self.image * images + self.picture * batch.dream_positions.shape[0] + self.encoded * encoded
        return int(total)


def _causal(lengths: torch.Tensor) -> float:
    """Pairs of a query and a key."""
    return float((lengths * (lengths + 1)).sum() / 2)


def _linear(module: nn.Module, trained: bool = False) -> int:
    """Of one position through all linear layers, or through those whose weights train."""
    linear = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(2 * weight.numel() for weight in linear if weight.requires_grad or not trained)


def _passes(module: nn.Module, flows: bool) -> int:
    """Of one position, forward and backward; `flows`: a gradient passes through."""
    return (1 + flows) * _linear(module) + _linear(module, trained=True)


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
