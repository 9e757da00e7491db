"""Attention by other libraries: torch's scaled_dot_product_attention and the package flash-attn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dreamkernels.ops.attention import reference

_FLASH_ATTN_DTYPES = (torch.float16, torch.bfloat16)


def _sdpa_unavailable(device_type: str) -> str:
    return ""


def _flash_attn_unavailable(device_type: str) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return "" if device_type == "cuda" else "it runs on cuda tensors only"


# Why a library cannot run on a device type, or "".
UNAVAILABLE: dict[str, Callable[[str], str]] = {"sdpa": _sdpa_unavailable, "flash_attn": _flash_attn_unavailable}


def _limits_of_sdpa(request: Any) -> str:
    if request.packed:
        return "it takes dense batches only"
    if request.softcap:
        return "it has no softcap"
    return "it does not return the lse" if request.return_lse else ""


def _limits_of_flash_attn(request: Any) -> str:
    if request.dtype not in _FLASH_ATTN_DTYPES:
        return f"it takes float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim > 256 or request.alignment != 8:
        return "it takes heads whose width is a multiple of 8 up to 256"
    if request.constant_kv_prefix:
        return "it has no constant_kv_prefix"
    return "its lse has no gradient" if request.return_lse else ""


# Why a library cannot run a request (choice.Request), or "".
LIMITS: dict[str, Callable[[Any], str]] = {"sdpa": _limits_of_sdpa, "flash_attn": _limits_of_flash_attn}


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    constant_kv_prefix: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Dense batches. The mask is a tensor unless it is none or the plain causal one."""
    if constant_kv_prefix is not None:
        constant = torch.arange(k.shape[1], device=k.device) < constant_kv_prefix[:, None]
        k, v = (torch.where(constant[:, :, None, None], t.detach(), t) for t in (k, v))
    len_q, len_k = q.shape[1], k.shape[1]
    plainly_causal = causal and window < 0 and len_q == len_k
    mask = None if plainly_causal else reference.visible_keys(len_q, len_k, causal, window, q.device)
    q_BHLD, k_BHLD, v_BHLD = (t.transpose(1, 2) for t in (q, k, v))
    out_BHLD = F.scaled_dot_product_attention(
        q_BHLD, k_BHLD, v_BHLD, mask, is_causal=plainly_causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out_BHLD.transpose(1, 2).contiguous()


def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlens: tuple[int, int],
    mask: tuple[bool, float, int, float],
) -> torch.Tensor:
    """flash-attn 2, with its deterministic backward; its window counts the keys on each side of the aligned one."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    causal, scale, window, softcap = mask
    side = window - 1 if window >= 0 else -1
    options = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (side, 0 if causal and window >= 0 else side),
        "softcap": softcap,
        "deterministic": True,
    }
    if cu_seqlens_q is None:
        return flash_attn_func(q, k, v, **options)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *max_seqlens, **options)
