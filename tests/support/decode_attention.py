"""Inputs of the decode_attention tests."""

from dataclasses import dataclass
from typing import Any

import torch

from dreamkernels import decode_attention
from dreamkernels.ops.decode_attention import reference as definition


@dataclass(frozen=True)
class Case:
    """One shape. `lengths` are the keys in the cache, with those of the new tokens, one per sequence."""

    lengths: tuple[int, ...] = (37, 5, 150)
    tokens: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    width: int = 64
    page_size: int = 0  # 0: contiguous
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    splits: int | None = None

    def __str__(self):
        parts = [f"{self.tokens}x{self.q_heads}:{self.kv_heads}x{self.width}", f"k{max(self.lengths, default=0)}"]
        names = ("page_size", "window", "softcap", "scale", "splits")
        parts += [f"{name.partition('_')[0]}{getattr(self, name):g}" for name in names if getattr(self, name)]
        return "-".join(parts + ["full"] * (not self.causal))

    @property
    def options(self) -> dict[str, Any]:
        names = ("causal", "window", "softcap", "scale", "splits")
        return {name: getattr(self, name) for name in names}


CASES = (
    Case(),
    Case(splits=3, width=128),
    Case(tokens=3, kv_heads=1, width=80, page_size=16, splits=2),
    Case(tokens=66, lengths=(300, 66), q_heads=2, width=32),
    Case(tokens=66, lengths=(300, 66), q_heads=2, width=128, splits=4, page_size=7),
    Case(tokens=20, lengths=(90, 20, 300), q_heads=6, width=96, window=33),
    Case(tokens=2, lengths=(100,), causal=False, window=9, splits=5),
    Case(tokens=5, lengths=(70,), causal=False, softcap=3.0, page_size=8),
    Case(tokens=4, lengths=(0, 2, 130), softcap=20.0, scale=0.3, splits=2),
    Case(tokens=128, lengths=(128,), q_heads=1, kv_heads=1, width=40),
    Case(q_heads=32, kv_heads=1, width=64, lengths=(129,)),
    Case(lengths=(), width=64),
    Case(tokens=0),
)
# Widths that the CUDA C++ kernel does not take.
ODD_CASES = (Case(width=5), Case(tokens=7, width=13, page_size=4, splits=2), Case(width=1), Case(width=160, tokens=9))


def make(case, dtype, device="cpu"):
    """q, k_cache, v_cache, cache_seqlens and, where the case is paged, the block table. What lies beyond the lengths is
    NaN: it must not be touched."""
    batch = len(case.lengths)
    capacity = max(case.lengths, default=0) + 5

    def normal(*shape):
        return torch.randn(shape, device=device).to(dtype)

    table = []
    if case.page_size:
        per_sequence = -(-capacity // case.page_size)
        pages = batch * per_sequence + 2
        caches = normal(2, pages, case.page_size, case.kv_heads, case.width)
        order = torch.randperm(pages, device=device)[: batch * per_sequence].int().view(batch, per_sequence)
        used = torch.zeros(pages, case.page_size, dtype=torch.bool, device=device)
        for b, length in enumerate(case.lengths):
            for position in range(length):
                used[order[b, position // case.page_size], position % case.page_size] = True
            order[b, -(-length // case.page_size) :] = -1
        table = [order]
    else:
        caches = normal(2, batch, capacity, case.kv_heads, case.width)
        used = torch.arange(capacity, device=device) < torch.tensor(case.lengths, device=device)[:, None]
    caches[:, ~used] = torch.nan
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return [normal(batch, case.tokens, case.q_heads, case.width), *caches.unbind(), lengths, *table]


def runner(case, implementation="auto"):
    def run(q, k_cache, v_cache, lengths, block_table=None):
        return decode_attention(
            q,
            k_cache,
            v_cache,
            lengths,
            block_table=block_table,
            return_lse=True,
            implementation=implementation,
            **case.options,
        )

    return run


def reference(case):
    def run(q, k_cache, v_cache, lengths, block_table=None):
        scale = q.shape[3] ** -0.5 if case.scale is None else case.scale
        mask = (case.causal, scale, case.window or -1, case.softcap or 0.0)
        out, lse = definition.decode_attention(q, k_cache, v_cache, lengths, block_table, *mask)
        return out, lse if q.dtype == torch.float64 else lse.float()

    return run


def trials(case):
    """Enough repetitions that some hundred values of lse are compared."""
    return max(1, min(16, 512 // max(1, len(case.lengths) * case.tokens * case.q_heads)))
