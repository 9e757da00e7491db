"""The forward of diffusers' UNet2DConditionModel with what its own cannot express.

- The condition may be a `DreamCondition`: keys and values of all layers, made once per picture.
- The time may be a row of a `TimeTable`: every ResNet block's projected time embedding, made once per schedule.
- The latents may be half of the condition's pictures: both halves of a guided batch share everything before the first
  cross-attention, which then is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from dreamkernels.conditioning import DreamCondition
from dreamkernels.integrations.unet_layout import Plan, TimeShift, doubled, hooked

__all__ = ["StepTime", "TimeTable", "transformer_blocks_in_order", "unet_forward", "why_not_walked"]

_DOWN: tuple[type, ...] = (DownBlock2D, CrossAttnDownBlock2D)
_UP: tuple[type, ...] = (UpBlock2D, CrossAttnUpBlock2D)
_MIDDLE: tuple[type, ...] = (UNetMidBlock2DCrossAttn,)


@dataclass(frozen=True)
class StepTime:
    """The time for every ResNet block, in the order in which they run: shifts [1 or latents, channels of the block]."""

    shifts: tuple[Tensor, ...]


@dataclass(frozen=True)
class TimeTable(Sequence):
    """Projected time embeddings of a schedule, [steps, channels of all ResNet blocks]; `table[i]` is a `StepTime`, and
    `table[[i, j]]` one for two latents at steps of their own."""

    rows: Tensor
    channels: tuple[int, ...]

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return TimeTable(self.rows[step], self.channels)
        if isinstance(step, Tensor):
            return StepTime(self.rows[step].split(self.channels, dim=1))
        steps = step if isinstance(step, list) else [step]
        for each in steps:
            if not -len(self) <= each < len(self):
                raise IndexError(f"the table has {len(self)} time steps; there is no {each}")
        if isinstance(step, list):
            return self[torch.tensor(step, device=self.rows.device)]
        return StepTime(self.rows[step : step + 1 or None].split(self.channels, dim=1))


def resnets_in_order(unet: Any) -> Iterator[Any]:
    for block in unet.down_blocks:
        yield from block.resnets
    if unet.mid_block is not None:
        yield from unet.mid_block.resnets
    for block in unet.up_blocks:
        yield from block.resnets


def transformer_blocks_in_order(unet: Any) -> Iterator[Any]:
    middle = [] if unet.mid_block is None else [unet.mid_block]
    for block in (*unet.down_blocks, *middle, *unet.up_blocks):
        for transformer in getattr(block, "attentions", ()):
            yield from getattr(transformer, "transformer_blocks", ())


def why_not_walked(unet: Any) -> str:
    """Why a UNet keeps its own forward (its blocks are optimised nevertheless), or ""."""
    blocks = [(block, _DOWN) for block in unet.down_blocks] + [(block, _UP) for block in unet.up_blocks]
    blocks += [] if unet.mid_block is None else [(unet.mid_block, _MIDDLE)]
    for block, known in blocks:
        if type(block) not in known:
            return f"it has a {type(block).__name__}"
    if any(resnet.time_embedding_norm != "default" for resnet in resnets_in_order(unet)):
        return "its time embedding scales, too"
    return ""


def why_not_tabulated(unet: Any) -> str:
    """Why a schedule's time embeddings cannot be made before the pictures, or ""."""
    if unet.config.addition_embed_type is not None or unet.class_embedding is not None:
        return "its time embedding depends on the prompt or the class, too"
    return ""


def time_table(unet: Any, timesteps: Tensor) -> TimeTable:
    """All ResNet blocks' projected time embeddings for the time steps [steps] of a schedule."""
    if reason := why_not_tabulated(unet):
        raise ValueError(f"this UNet takes no time table: {reason}; give the time steps themselves")
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps {list(timesteps.shape)} must be [steps]")
    with torch.no_grad():
        embedding = unet.time_embedding(unet.time_proj(timesteps.to(unet.device)).to(unet.dtype))
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        shifts = [_project_time(resnet, embedding) for resnet in resnets_in_order(unet)]
    return TimeTable(torch.cat(shifts, dim=1), tuple(shift.shape[1] for shift in shifts))


def _project_time(resnet: Any, embedding: Tensor) -> Tensor:
    return resnet.time_emb_proj(embedding if resnet.skip_time_act else resnet.nonlinearity(embedding))


def unet_forward(
    plan: Plan,
    unet: Any,
    sample: Tensor,
    timestep: Any,
    encoder_hidden_states: Any,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    down_block_additional_residuals: Any = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: Any = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """UNet2DConditionModel's forward. What this one does not know goes through the original."""
    condition, pictures = encoder_hidden_states, _pictures(plan, sample, encoder_hidden_states)
    sample = sample.contiguous(memory_format=torch.channels_last)
    extras: tuple[Any, ...] = (
        attention_mask,
        encoder_attention_mask,
        down_intrablock_additional_residuals,
        cross_attention_kwargs or None,
    )
    residuals = (down_block_additional_residuals, mid_block_additional_residual)
    if (residuals[0] is None) != (residuals[1] is None):  # a T2I adapter's, by an old convention
        extras += residuals
    if plan.unet_obstacle or any(extra is not None for extra in extras) or _altered(unet):
        if isinstance(timestep, StepTime):
            raise ValueError(
                "a row of a time table cannot be given here: "
                + (
                    plan.unet_obstacle
                    or "masks, adapters' residuals, checkpointing, FreeU and hooks need the time step"
                )
            )
        return type(unet).forward(  # by name, as its decorator for the scale of adapters wants
            unet,
            sample=doubled(sample, pictures),
            timestep=timestep,
            encoder_hidden_states=condition,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs,
            added_cond_kwargs=added_cond_kwargs,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )
    half = _shared_half(sample, timestep, pictures, class_labels, added_cond_kwargs)
    sample = doubled(sample, pictures) if half is None else half
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    times = _times(plan, unet, sample, timestep, condition, class_labels, timestep_cond, added_cond_kwargs, pictures)
    condition = _processed(unet, condition, added_cond_kwargs)
    sample = _walk(unet, unet.conv_in(sample), times, condition, pictures, residuals)
    if unet.conv_norm_out:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    sample = unet.conv_out(sample)
    return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


def _pictures(plan: Plan, sample: Tensor, condition: Any) -> int:
    """How many pictures the result has. Raises ValueError when latents and condition do not fit."""
    if sample.dim() != 4:
        raise ValueError(f"latents {list(sample.shape)} must be [pictures, channels, height, width]")
    count = sample.shape[0]
    if isinstance(condition, DreamCondition):
        if plan.layers is None:
            raise ValueError(f"this UNet takes no DreamCondition: {plan.unet_obstacle or 'it has no cross-attention'}")
        condition.check_layers(plan.layers)
        given = condition.pictures
    elif isinstance(condition, Tensor):
        given = condition.shape[0]
    else:
        return count
    if given not in (count, 2 * count):
        raise ValueError(
            f"{count} latents were given with a condition for {given} pictures; possible are {count}, or {2 * count} "
            "(unguided and guided half of the same latents)"
        )
    return given


def _shared_half(sample: Tensor, timestep: Any, pictures: int, *others: Any) -> Tensor | None:
    """The latents that both halves of a guided batch share, or None where they differ in more than the condition.

    A pipeline gives every latent twice. On CPU that is seen at once; on other devices looking would stop the host, so
    that latents given once are the way there.
    """
    times = timestep.shifts[0].shape[0] if isinstance(timestep, StepTime) else 1
    times = timestep.numel() if torch.is_tensor(timestep) else times
    if any(other is not None for other in others) or times == pictures > 1:
        return None
    if sample.shape[0] != pictures:
        return sample
    if sample.device.type != "cpu" or pictures % 2 or sample.requires_grad or torch.compiler.is_compiling():
        return None
    first, second = sample.chunk(2)
    return first if torch.equal(first, second) else None


def _altered(unet: Any) -> bool:
    """Whether something is switched on that only the original forward does."""
    blocks = [*unet.down_blocks, *unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    checkpointing = torch.is_grad_enabled()
    return any(
        hooked(block)
        or (checkpointing and getattr(block, "gradient_checkpointing", False))
        or getattr(block, "s1", None)
        for block in blocks
    )


def _processed(unet: Any, condition: Any, added_cond_kwargs: Any) -> Any:
    if isinstance(condition, DreamCondition):
        return condition
    return unet.process_encoder_hidden_states(encoder_hidden_states=condition, added_cond_kwargs=added_cond_kwargs)


def _times(
    plan: Plan,
    unet: Any,
    sample: Tensor,
    timestep: Any,
    condition: Any,
    class_labels: Tensor | None,
    timestep_cond: Tensor | None,
    added_cond_kwargs: Any,
    pictures: int,
) -> Iterator[TimeShift]:
    """Every ResNet block's shift, in order. One time step for all pictures is embedded once."""
    if isinstance(timestep, StepTime):
        given = tuple(shift.shape[1] for shift in timestep.shifts)
        wanted = tuple(resnet.out_channels for resnet in resnets_in_order(unet))
        if given != wanted:
            raise ValueError(f"the time table was made for a UNet with blocks of {given} channels; this has {wanted}")
        rows = timestep.shifts[0].shape[0]
        if rows not in (1, sample.shape[0], pictures // 2):
            raise ValueError(f"times of {rows} latents were given for {sample.shape[0]}; possible are 1 and as many")
        return map(TimeShift, timestep.shifts)
    alone = not torch.is_tensor(timestep) or timestep.numel() == 1
    rows = 1 if alone else timestep.shape[0]
    if rows not in (1, sample.shape[0]):
        raise ValueError(f"{rows} time steps were given for {sample.shape[0]} latents; possible are 1 and as many")
    projected = unet.get_time_embed(sample=sample[:1].expand(rows, -1, -1, -1), timestep=timestep)
    embedding = unet.time_embedding(projected, timestep_cond)
    class_embedding = unet.get_class_embed(sample=sample, class_labels=class_labels)
    if class_embedding is not None:
        if unet.config.class_embeddings_concat:
            embedding = torch.cat([embedding.expand(class_embedding.shape[0], -1), class_embedding], dim=-1)
        else:
            embedding = embedding + class_embedding
    added = unet.get_aug_embed(emb=embedding, encoder_hidden_states=condition, added_cond_kwargs=added_cond_kwargs)
    embedding = embedding if added is None else embedding + added
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    if plan.time_projection is not None and plan.owner is unet and not embedding.requires_grad:
        shifts = plan.time_projection(F.silu(embedding))
        return map(TimeShift, shifts.split([resnet.out_channels for resnet in resnets_in_order(unet)], dim=1))
    return (TimeShift(_project_time(resnet, embedding)) for resnet in resnets_in_order(unet))


def _walk(
    unet: Any, sample: Tensor, times: Iterator[TimeShift], condition: Any, pictures: int, residuals: tuple[Any, Any]
) -> Tensor:
    """Down, middle, up: the blocks' modules in the order of diffusers' blocks. `residuals`: a ControlNet's."""
    factor = 2**unet.num_upsamplers
    forced = any(side % factor for side in sample.shape[2:])  # odd sizes: upsampling is told what to return to
    skips = [sample]
    for block in unet.down_blocks:
        for number, resnet in enumerate(block.resnets):
            sample = _attend(block, number, resnet(sample, next(times)), condition)
            skips.append(sample)
        for downsampler in block.downsamplers or ():
            sample = downsampler(sample)
            skips.append(sample)
    if residuals[0] is not None:
        skips = [doubled(skip, r.shape[0]) + r for skip, r in zip(skips, residuals[0], strict=True)]
    if unet.mid_block is not None:
        first, *others = unet.mid_block.resnets
        sample = first(sample, next(times))
        for number, resnet in enumerate(others):
            sample = resnet(_attend(unet.mid_block, number, sample, condition), next(times))
    if residuals[1] is not None:
        sample = sample + residuals[1]
    for block in unet.up_blocks:
        for number, resnet in enumerate(block.resnets):
            skip = doubled(skips.pop(), sample.shape[0])
            sample = _attend(block, number, resnet(torch.cat([sample, skip], dim=1), next(times)), condition)
        for upsampler in block.upsamplers or ():
            sample = upsampler(sample, skips[-1].shape[2:] if forced and skips else None)
    return doubled(sample, pictures)


def _attend(block: Any, number: int, sample: Tensor, condition: Any) -> Tensor:
    attentions = getattr(block, "attentions", None)
    return sample if attentions is None else attentions[number](sample, condition, return_dict=False)[0]
