"""Where the dream queries look: at pictures of their prompt, in the decoder's attention, and where they act in the
picture that follows, in the UNet's cross-attention, recorded while it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from dreamllm.documents import Document, load_picture
from dreamllm.inference import DrawingOptions, Engine, draw
from dreamllm.inference.conditions import evaluating
from dreamllm.inference.prompts import Prompts

CROSS_ATTENTION = "attn2.processor"


class CrossAttentionRecorder:
    """An attention processor that computes the probabilities explicitly and adds them up.

    It records the last `count` rows of the batch (the guided half) and averages over heads, layers and calls.
    """

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self._count, self._size = count, size
        self._sum: Tensor | None = None
        self._calls = 0

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states [B, N, C], N a square; encoder_hidden_states [B, Q, cross-attention width] -> [B, N, C]."""
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self._record(probabilities.unflatten(0, (hidden_states.shape[0], -1)))
        output = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor

    def _record(self, probabilities_BHNQ: Tensor) -> None:
        maps_MNQ = probabilities_BHNQ[-self._count :].float().mean(1)
        side = isqrt(maps_MNQ.shape[1])
        maps = maps_MNQ.transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, self._size, mode="bilinear", align_corners=False)
        self._sum = maps if self._sum is None else self._sum + maps
        self._calls += 1

    def maps(self) -> Tensor:
        """float32 [M, Q, h, w]: the share of each position's attention that each query gets; sums to 1 over Q."""
        if self._sum is None:
            raise ValueError("nothing was recorded: the UNet has no cross-attention, or nothing was drawn")
        return self._sum / self._calls


@contextmanager
def recorded_attention(unet: Any, count: int, size: tuple[int, int]) -> Iterator[CrossAttentionRecorder]:
    """Records the cross-attention of `count` pictures drawn inside by `unet` (of diffusers), and restores it after."""
    before = unet.attn_processors
    recorder = CrossAttentionRecorder(count, size)
    unet.set_attn_processor({n: recorder if n.endswith(CROSS_ATTENTION) else p for n, p in before.items()})
    try:
        yield recorder
    finally:
        unet.set_attn_processor(before)


def dream_attention(
    engine: Engine, prompts: Sequence[Document], drawing: DrawingOptions, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Draws a picture after each prompt and records where each dream query acts.

    Returns pictures [M, C, H, W] in [0, 1] and maps float32 [M, Q, h, w] of the latents' size, averaged over heads,
    layers and steps; over the queries they sum to 1 at every position.
    """
    condition = engine.conditions(prompts)
    null = engine.null_condition(drawing.negative_prompt) if drawing.guided else None
    together = replace(drawing, batch_size=len(prompts), candidates=1)
    side = engine.model.config.unet_config["sample_size"]
    if drawing.size is not None:
        side = drawing.size // engine.model.config.spatial_factor
    with recorded_attention(engine.model.unet, len(prompts), (side, side)) as recorder:
        pictures = draw(engine.model, condition, null, together, seeds)
    return pictures, recorder.maps()


@torch.no_grad()
def reading_attention(engine: Engine, prompt: Document) -> Tensor:
    """How much each dream query after a prompt looks at each patch of the prompt's pictures.

    Returns maps float32 [N, Q, h, w] of N pictures and h x w patches: probabilities of the decoder's self-attention,
    averaged over heads and layers. Over everything that a query sees they sum to 1; the rest goes to text and queries.

    Raises `ValueError` for a prompt without pictures and one behind which no picture fits; `PictureError`.
    """
    if not prompt.pictures():
        raise ValueError(f"{prompt.name or 'the prompt'} has no picture that dream queries could look at")
    model, layout = engine.model, engine.layout
    prompts = Prompts(model, engine.processor)
    encoded = prompts.for_picture(prompt)
    with evaluating(model):
        (embeds,) = prompts.embed([(encoded, [load_picture(source) for source in encoded.images])])
        embeds = torch.cat([embeds, prompts.dream_piece()])[None]
        weights_QT = _attention_of_last(model.decoder, embeds, layout.num_dream_queries + 1)[:-1]
    ids = torch.tensor(encoded.input_ids)
    starts = (ids == layout.im_start).nonzero().flatten() + 1
    side = isqrt(layout.tokens_per_image)
    patches = [weights_QT[:, start : start + layout.tokens_per_image] for start in starts.tolist()]
    return torch.stack(patches).unflatten(2, (side, side))


def _attention_of_last(decoder: Any, embeds: Tensor, count: int) -> Tensor:
    """Self-attention of the last `count` of T positions, [count, T] float32, averaged over heads and layers."""
    length = embeds.shape[1]
    positions = torch.arange(length, device=embeds.device)
    states = decoder(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states
    cos, sin = decoder.rotary_emb(embeds, positions[None])
    hidden_after = positions[None] > positions[-count:, None]
    total = torch.zeros(count, length, device=embeds.device)
    for layer, hidden in zip(decoder.layers, states, strict=False):  # the last of the states are the result
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        heads = (*normed.shape[:2], -1, attention.head_dim)
        query, key = (project(normed).view(heads).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key = repeat_kv(key, query.shape[1] // key.shape[1])
        scores = query[0, :, -count:].float() @ key[0].float().transpose(1, 2) * attention.scaling
        total += scores.masked_fill(hidden_after, float("-inf")).softmax(-1).mean(0)
    return total / len(decoder.layers)
