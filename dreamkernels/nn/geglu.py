"""GEGLU as a module."""

from __future__ import annotations

import torch

from dreamkernels.ops import geglu


class GEGLU(torch.nn.Module):
    """A linear projection to hidden and gate, then hidden * GELU(gate): a drop-in for diffusers' GEGLU.

    The projection is called `proj` and has 2 * dim_out outputs, the hidden half first.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(dim_in, 2 * dim_out, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., dim_in] -> [..., dim_out]."""
        return geglu(self.proj(hidden_states))
