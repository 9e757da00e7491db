"""GroupNormSiLU as a module."""

from __future__ import annotations

import torch

from dreamkernels.ops import group_norm_silu


class GroupNormSiLU(torch.nn.Module):
    """Group normalisation followed by SiLU (or nothing): torch.nn.GroupNorm and the activation after it in one.

    The parameters are those of torch.nn.GroupNorm: `weight` (starts at one) and `bias` (starts at zero).
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.activation = activation
        ones = torch.nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype)) if affine else None
        zeros = torch.nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype)) if affine else None
        self.register_parameter("weight", ones)
        self.register_parameter("bias", zeros)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, num_channels, ...], shift [N, num_channels] added before the norm -> the shape of x."""
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation, shift=shift
        )

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, activation={self.activation}"
