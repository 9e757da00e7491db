"""attention for the UNets of diffusers.

    use_attention(unet)

Self-attention and cross-attention of every block run dreamkernels.attention; parameters stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
except ImportError as error:
    raise ImportError(
        "dreamkernels.integrations.diffusers_attention needs diffusers: pip install 'dreamkernels[dreamllm]'"
    ) from error

from dreamkernels.ops import attention

__all__ = ["DreamkernelsAttnProcessor", "use_attention"]


class DreamkernelsAttnProcessor:
    """What diffusers' AttnProcessor2_0 computes, without its transposed copies. A mask is an error."""

    def __init__(self, implementation: str = "auto") -> None:
        self.implementation = implementation

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, N, C] or [B, C, h, w]; encoder_hidden_states [B, Q, C'] -> as hidden_states."""
        if attention_mask is not None:
            raise ValueError(
                "DreamkernelsAttnProcessor takes no attention_mask; leave it out, or keep diffusers' AttnProcessor2_0"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q_BNHD = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
        k_BQHD = attn.to_k(context).unflatten(2, (attn.heads, -1))
        v_BQHD = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if attn.norm_q is not None:
            q_BNHD = attn.norm_q(q_BNHD)
        if attn.norm_k is not None:
            k_BQHD = attn.norm_k(k_BQHD)
        out = attention(q_BNHD, k_BQHD, v_BQHD, implementation=self.implementation).flatten(2)

        out = attn.to_out[1](attn.to_out[0](out))
        if image_shape is not None:
            out = out.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def use_attention(unet: Any, implementation: str = "auto") -> dict[str, Any]:
    """Makes every attention of a diffusers model that ran AttnProcessor2_0 run dreamkernels.attention.

    Returns the processors as they were; `unet.set_attn_processor(returned)` restores them.
    Raises ValueError when none was replaced.
    """
    before = dict(unet.attn_processors)
    ours = DreamkernelsAttnProcessor(implementation)
    after = {name: ours if type(old) is AttnProcessor2_0 else old for name, old in before.items()}
    if ours not in after.values():
        kinds = sorted({type(old).__name__ for old in before.values()})
        raise ValueError(f"no attention of this model runs AttnProcessor2_0 ({', '.join(kinds) or 'it has none'})")
    unet.set_attn_processor(after)
    return before
