"""The definition of decode_attention in plain PyTorch: one sequence after another, reading the lengths on the host."""

from __future__ import annotations

import torch

from dreamkernels.ops.attention.reference import attend


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[2] // k_cache.shape[2]
    outputs, lses = [], []
    for sequence, length in enumerate(cache_seqlens.tolist()):
        if block_table is None:
            keys, values = k_cache[sequence], v_cache[sequence]
        else:
            used = block_table[sequence, : -(-length // k_cache.shape[1])].long()
            keys, values = k_cache[used].flatten(0, 1), v_cache[used].flatten(0, 1)
        k_HSD, v_HSD = (x[:length].transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))
        out, lse = attend(q[sequence].transpose(0, 1), k_HSD, v_HSD, causal, scale, window, softcap)
        outputs.append(out.transpose(0, 1))
        lses.append(lse)
    if outputs:
        return torch.stack(outputs), torch.stack(lses)
    return q * 1, q.new_empty((0, q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
