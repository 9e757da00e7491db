"""RotaryEmbedding as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops import rotary, rotary_tables
from dreamkernels.ops.rotary import LAYOUTS


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding with its own tables, of `length` positions.

    The tables are in float32 and stay so when the module is cast. They are no part of the state dict: the arguments,
    those of `rotary_tables`, say what they are.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        dim: int,
        length: int,
        base: float = 10000.0,
        scaling: str | None = None,
        factor: float = 1.0,
        original_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "base": base,
            "scaling": scaling,
            "factor": factor,
            "original_length": original_length,
        }
        cos, sin = rotary_tables(length, dim, base, scaling, factor, original_length, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        layout: str | None = None,
        inplace: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k as `rotary` takes them -> the same, rotated. Without position_ids, tokens are at 0, 1, 2, ...

        Raises ValueError when there are more tokens than positions, besides what `rotary` raises.
        """
        cos, sin = self.cos, self.sin
        if position_ids is None:
            layout = layout or ("thd" if q.dim() == 3 else "bhtd")
            tokens = q.shape[layout.index("t")] if layout in LAYOUTS else 0  # an unknown layout is refused below
            if tokens > cos.shape[0]:
                raise ValueError(f"{tokens} tokens need more than the {cos.shape[0]} positions of the tables")
            cos, sin = cos[:tokens], sin[:tokens]
        return rotary(q, k, cos, sin, position_ids, layout=layout, inplace=inplace)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Follows moves between devices; keeps float32, since rounded angles are wrong at large positions."""
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        device = self.cos.device
        if cos.is_meta and device.type != "meta":  # made without values, which cannot be moved
            cos, sin = rotary_tables(cos.shape[0], cos.shape[1], **self.settings, device=device)
        self.cos, self.sin = cos.to(device=device), sin.to(device=device)
        return self

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        return f"{self.cos.shape[1]}, {self.cos.shape[0]}, {settings}"
