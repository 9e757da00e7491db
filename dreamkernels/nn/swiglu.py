"""SwiGLU as a module."""

from __future__ import annotations

import torch

from dreamkernels.ops import swiglu


class SwiGLU(torch.nn.Module):
    """LLaMA's feed-forward layer, down_proj(silu(gate_proj(x)) * up_proj(x)); a drop-in for transformers' LlamaMLP.

    The projections have the names that LLaMA checkpoints use. For activations of your own projections, call
    `dreamkernels.swiglu`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., hidden_size] -> [..., hidden_size]."""
        return self.down_proj(swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))
