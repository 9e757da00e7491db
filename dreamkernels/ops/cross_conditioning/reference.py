"""Attention of image positions to the few keys of a condition: the definition."""

import torch


def cross_conditioning(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    repeats = q.shape[0] // max(1, k.shape[0])
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    weights = torch.softmax(logits, -1).to(q.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2).contiguous()
