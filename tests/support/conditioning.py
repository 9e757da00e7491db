"""Cross-attention layers and conditions for the tests of conditioning."""

import pytest
import torch

from dreamkernels import ConditionLayer, DreamCondition

WIDTH = 48
LAYERS = ((2, 16, 32), (3, 8, 24), (1, 40, 40))  # heads, head width, channels


def attentions(dtype=torch.float32):
    """diffusers' own cross-attention layers, with random weights and biases."""
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    made = []
    for heads, width, channels in LAYERS:
        module = diffusers.Attention(channels, WIDTH, heads, dim_head=width, processor=diffusers.AttnProcessor2_0())
        made.append(module.to(dtype).requires_grad_(False))
    return made


def random_condition(conditions=2, keys=6, dtype=torch.float32):
    layers = tuple(ConditionLayer(heads, width) for heads, width, _ in LAYERS)
    return DreamCondition(torch.randn(conditions, keys, sum(layer.columns for layer in layers)).to(dtype), layers)
