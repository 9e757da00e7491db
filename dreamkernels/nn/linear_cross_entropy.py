"""The loss of a language-model head as a module."""

from __future__ import annotations

import torch

from dreamkernels.ops import linear_cross_entropy


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of a head's logits, which never exist at once: CrossEntropyLoss(head(hidden)).

    The arguments are those of `dreamkernels.linear_cross_entropy`. It holds no parameters; the head, or its weight, is
    passed at each call, so that a tied or sharded weight stays where it is.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        softcap: float | None = None,
        z_loss: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap
        self.z_loss = z_loss
        self.chunk = chunk

    def forward(
        self, hidden: torch.Tensor, head: torch.nn.Module | torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """hidden [..., H], targets [...] -> float32 scalar, or [...] for reduction="none".

        head: its weight [V, H], or a module that has it as `weight` (such as LLaMA's lm_head). Raises ValueError when
        that module has a bias.
        """
        weight = head if isinstance(head, torch.Tensor) else head.weight
        if getattr(head, "bias", None) is not None:
            raise ValueError("the head has a bias, which linear_cross_entropy does not support; make it bias=False")
        assert isinstance(weight, torch.Tensor)
        return linear_cross_entropy(
            hidden, weight, targets, self.ignore_index, self.reduction, self.softcap, self.z_loss, self.chunk
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, softcap={self.softcap}, "
            f"z_loss={self.z_loss}, chunk={self.chunk}"
        )
