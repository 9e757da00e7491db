"""attention for any transformers model that uses its attention interface: LLaMA, CLIP and their kin.

    dreamkernels.integrations.transformers_attention.register()
    model.set_attn_implementation("dreamkernels")

Packed sequences take transformers' own names for them, cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k,
with a batch of one; they need no mask:

    model(input_ids=ids[None], position_ids=positions[None], attention_mask=no_mask(ids), use_cache=False,
          cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=longest, max_length_k=longest)

What the operator does not compute, dropout and masks that are neither causal nor full (padding, a static cache), runs
torch's scaled_dot_product_attention, with one warning for each reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        "dreamkernels.integrations.transformers_attention needs transformers 5: pip install 'dreamkernels[dreamllm]'"
    ) from error

from dreamkernels.integrations.constant_prefix import ConstantPrefix
from dreamkernels.ops import attention
from dreamkernels.ops.operator import FLOAT_DTYPES, FallbackWarning

__all__ = ["NAME", "ConstantPrefix", "attention_forward", "attention_mask", "no_mask", "register"]

NAME = "dreamkernels"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"attention runs torch's scaled_dot_product_attention: {reason}; expect more time and memory",
        FallbackWarning,
        stacklevel=4,
    )


def no_mask(like: Tensor) -> Tensor:
    """The mask that makes transformers build none, for packed sequences: without it, it would be [T, T]."""
    return torch.ones(1, 1, 1, 1, device=like.device)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """None where the mask is causal up to the last key, or full, which `attention_forward` then computes; otherwise
    the mask that scaled_dot_product_attention takes. Called by transformers."""
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    plain = attention_mask is None and mask_function is causal_mask_function and allow_is_causal_skip
    if plain and ends_together and kv_offset == 0:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and ends_together,
        **options,
    )


def _why_not(query: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]) -> str:
    if mask is not None:
        return "the mask is neither causal nor full (padding, or a static cache)"
    if dropout:
        return f"dropout of the attention weights is {dropout}"
    if value.shape[-1] != query.shape[-1]:
        return "values are not as wide as queries"
    if query.dtype not in FLOAT_DTYPES:
        return f"the dtype is {query.dtype}"
    unknown = [name for name in ("position_bias", "cache", "s_aux") if options.get(name) is not None]
    return f"{unknown[0]} was given" if unknown else ""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    constant_prefix: ConstantPrefix | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, L_q, D], key and value [B, H_kv, L_k, D] -> [B, L_q, H, D].

    With cu_seq_lens_* (int32 [N + 1]) the batch is one pack and `attention_mask` is not read. `constant_prefix` takes
    the keys and values of packed sequences, or puts its own before them, see `constant_prefix.py`.
    Raises ValueError when packed sequences come with dropout, or with more than one row, and for a prefix without them.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    packed = cu_seq_lens_q is not None
    reason = _why_not(query, value, None if packed else attention_mask, dropout, options)
    if packed:
        if reason:
            raise ValueError(f"packed sequences cannot run in dreamkernels.attention: {reason}")
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q packs sequences into one row; the batch has {query.shape[0]}")
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        constant: int | Tensor = 0
        if constant_prefix is not None:
            layer: Any = module.layer_idx
            if constant_prefix.complete:
                k, v = constant_prefix.extend(layer, k, v)
                constant = constant_prefix.lengths
            else:
                constant_prefix.store(layer, k, v)
        out = attention(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            causal=causal,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            constant_kv_prefix=constant,
        )
        return out[None], None
    if constant_prefix is not None:
        raise ValueError("constant_prefix belongs to packed sequences: give cu_seq_lens_q and cu_seq_lens_k")
    if reason:
        if not torch.compiler.is_compiling():
            _warn_once(reason)
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            softcap=softcap,
            **options,
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return attention(q, k, v, causal=causal, scale=scaling, window=sliding_window, softcap=softcap), None


def register() -> str:
    """Makes "dreamkernels" known to transformers and returns that name. May be called any number of times."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME
