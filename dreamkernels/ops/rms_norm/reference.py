"""Root mean square layer normalisation (Zhang and Sennrich, 2019) with LLaMA's rounding: the definition."""

from typing import overload

import torch


@overload
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: None = ...) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance = wide.pow(2).mean(-1, keepdim=True)
    y = weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)
    return y if residual is None else (y, x)
