"""Projectors between the widths of the components (spec A.3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class Projector(nn.Module):
    """Linear (depth 1), or Linear then (GELU, Linear) repeated (depth >= 2); optionally a LayerNorm after."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: Literal["linear", "mlp"] = "linear",
        depth: int = 1,
        bias: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.projector: nn.Module
        if kind == "linear":
            self.projector = nn.Linear(in_features, out_features, bias=bias)
        else:
            layers: list[nn.Module] = [nn.Linear(in_features, out_features, bias=bias)]
            for _ in range(depth - 1):
                layers += [nn.GELU(), nn.Linear(out_features, out_features, bias=bias)]
            self.projector = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(out_features) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.projector(features))
