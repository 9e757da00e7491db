"""Cross-entropy of the logits hidden weight^T: the definition."""

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = targets.flatten().long()
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none")
    if z_loss:
        losses = losses + torch.where(flat == ignore_index, 0.0, z_loss * logits.logsumexp(-1).square())
    if reduction == "none":
        return losses.view(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (flat != ignore_index).sum().clamp(min=1)
