"""LayerNorm as a module."""

from __future__ import annotations

import torch

from dreamkernels.ops import layer_norm


class LayerNorm(torch.nn.Module):
    """Layer normalisation of the last dimension, a drop-in for torch.nn.LayerNorm over one dimension.

    The parameters are called `weight` (starts at one) and `bias` (starts at zero).
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = normalized_shape
        self.eps = eps
        weight = torch.ones(normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        zeros = torch.zeros(normalized_shape, device=device, dtype=dtype) if elementwise_affine and bias else None
        self.register_parameter("weight", None if weight is None else torch.nn.Parameter(weight))
        self.register_parameter("bias", None if zeros is None else torch.nn.Parameter(zeros))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., normalized_shape] -> the same shape.

        Raises ValueError where the last dimension is another one.
        """
        if x.shape[-1:] != (self.normalized_shape,):
            raise ValueError(f"x {list(x.shape)} needs a last dimension of {self.normalized_shape}")
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"
