"""What the Hugging Face interface needs beyond the packed one: slots found in ids, masks, losses of padded states.

Tensor name suffixes as in `modeling.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreamllm.documents.layout import IGNORE_INDEX
from dreamllm.model.diffusion import DiffusionDraws
from dreamllm.model.slots import SlotIndex

if TYPE_CHECKING:
    from dreamllm.model.modeling import DreamLLM


def is_first_call(past_key_values: Any) -> bool:
    return past_key_values is None or past_key_values.get_seq_length() == 0


def check_ids(model: DreamLLM, input_ids: Tensor, past_key_values: Any) -> None:
    length = input_ids.shape[1] + (0 if past_key_values is None else past_key_values.get_seq_length())
    if length > model.layout.max_length:
        raise ValueError(f"{length} tokens exceed the context of {model.layout.max_length}")
    if input_ids.device.type == "cpu" and input_ids.numel():
        low, high = input_ids.aminmax()
        if low < 0 or high >= model.config.vocab_size:
            raise ValueError(
                f"input ids must lie in [0, {model.config.vocab_size}); found {low.item()} to {high.item()}"
            )


def embed_slots(
    model: DreamLLM, input_ids: Tensor, slots: SlotIndex, pixel_values: Tensor | None, with_targets: bool
) -> Tensor:
    """Embeddings [B, T, H] with pictures and dream queries in their slots."""
    found = 0 if pixel_values is None else pixel_values.shape[0]
    original = model.config.compat == "original"
    if slots.num_images != found and not (original and found < slots.num_images):
        raise ValueError(f"{slots.num_images} image slots but {found} pictures; they must match one to one")
    features = None if pixel_values is None else model.encode_images(pixel_values)
    index = slots.splice_index(
        images=found,
        queries=with_targets or not original,  # the original leaves the queries out unless targets are given
    )
    return model.embed(input_ids.flatten(), index, features).unflatten(0, input_ids.shape)


def positions(model: DreamLLM, attention_mask: Tensor, length: int) -> Tensor | None:
    if model.config.compat == "original":
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def lm_loss(model: DreamLLM, states_BTH: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:]
    learned = targets != IGNORE_INDEX
    return model._lm_loss(states_BTH[:, :-1][learned], targets[learned])


def vm_loss(
    model: DreamLLM,
    states_BTH: Tensor,
    slots: SlotIndex | None,
    targets: tuple[Tensor | None, Tensor | None],
    generator: torch.Generator | None,
    draws: DiffusionDraws | None,
) -> Tensor:
    """`targets`: pictures or their latents."""
    if slots is None:
        raise ValueError("target pictures need input_ids, so that their dream slots can be found")
    at = slots.dream_positions()
    pixels, latents = targets
    given = latents if latents is not None else pixels
    if model.config.compat == "original" and given is not None:  # surplus slots are silently dropped there
        at = at[: given.shape[0]]
    latents = model._latents(pixels, latents, at.shape[0], generator)
    needs_null = model.config.condition_dropout > 0 or (draws is not None and draws.keep_condition is not None)
    null_QH = null_states(model) if needs_null else None
    return model._vm_loss(states_BTH.flatten(0, 1)[at], latents, null_QH, generator, draws)


def null_states(model: DreamLLM) -> Tensor:
    """States at the dream queries after the empty prompt, [Q, H]."""
    layout = model.layout
    ids = torch.tensor([layout.bos, *layout.dream_ids(), layout.eos], device=model.device)
    index = torch.full_like(ids, -1)
    if model.config.compat != "original":  # the original forgets to place the queries here
        index[2:-2] = torch.arange(layout.num_dream_queries, device=model.device)
    states = model.decoder(inputs_embeds=model.embed(ids, index, None)[None], use_cache=False).last_hidden_state
    return states[0, 2:-2]
