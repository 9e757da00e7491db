"""RMSNorm as a module."""

from __future__ import annotations

import torch

from dreamkernels.ops import rms_norm


class RMSNorm(torch.nn.Module):
    """Root mean square normalisation of the last dimension, a drop-in for transformers' LlamaRMSNorm.

    The parameter is called `weight` and starts at one; `variance_epsilon` is added to the mean square. Where the
    weight is wider than the input (float32 weights, bfloat16 activations) both are promoted first, as the product in
    LlamaRMSNorm is, and the result has the promoted dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [..., H] -> y, or with a residual of the same shape (y, hidden_states + residual)."""
        weight: torch.Tensor = self.weight
        if weight.dtype != hidden_states.dtype:
            dtype = torch.promote_types(weight.dtype, hidden_states.dtype)
            weight, hidden_states = weight.to(dtype), hidden_states.to(dtype)
            residual = None if residual is None else residual.to(dtype)
        if residual is None:
            return rms_norm(hidden_states, weight, self.variance_epsilon)
        return rms_norm(hidden_states, weight, self.variance_epsilon, residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"
