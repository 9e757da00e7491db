"""Inputs of the append_kv tests."""

from dataclasses import dataclass

import torch

from dreamkernels import append_kv
from dreamkernels.ops.append_kv import reference as definition


@dataclass(frozen=True)
class Case:
    """One shape. `lengths` are the tokens that are in the cache already, one per sequence."""

    lengths: tuple[int, ...] = (5, 0, 17)
    tokens: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    width: int = 64
    rotated: int = 64
    norm: bool = False
    page_size: int = 0  # 0: contiguous
    float_tables: bool = True

    def __str__(self):
        parts = [f"{self.tokens}x{self.q_heads}:{self.kv_heads}x{self.width}", f"r{self.rotated}"]
        parts += ["norm"] * self.norm + [f"page{self.page_size}"] * bool(self.page_size)
        return "-".join(parts + ["tables"] * (not self.float_tables))


CASES = (
    Case(),
    Case(tokens=3, width=128, rotated=128, kv_heads=4, page_size=16),
    Case(tokens=2, width=80, rotated=32, norm=True, float_tables=False),
    Case(tokens=66, lengths=(3,), width=32, rotated=32, page_size=7, norm=True),
    Case(width=5, rotated=2, q_heads=1, kv_heads=1),
    Case(width=13, rotated=6, q_heads=9, kv_heads=3, norm=True, page_size=4, float_tables=False),
    Case(width=256, rotated=256, q_heads=20, kv_heads=1, norm=True),
    Case(lengths=()),
    Case(tokens=0),
)


def make(case, dtype, device="cpu"):
    """q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, then both norm weights and the block table where the case has
    them."""
    batch, tokens = len(case.lengths), case.tokens
    capacity = max(case.lengths, default=0) + tokens + 3

    def normal(*shape):
        return torch.randn(shape, device=device).to(dtype)

    q = normal(batch, tokens, case.q_heads, case.width)
    k, v = normal(2, batch, tokens, case.kv_heads, case.width)
    table = []
    if case.page_size:
        per_sequence = -(-capacity // case.page_size)
        pages = batch * per_sequence + 2
        cache_shape = (pages, case.page_size, case.kv_heads, case.width)
        order = torch.randperm(pages, device=device)[: batch * per_sequence]
        table = [order.int().view(batch, per_sequence)]
    else:
        cache_shape = (batch, capacity, case.kv_heads, case.width)
    angle = torch.rand(capacity, case.rotated // 2, device=device) * 6.2832
    angle = torch.cat((angle, angle), -1)
    table_dtype = torch.float32 if case.float_tables else dtype
    weights = [(1 + 0.2 * torch.randn(case.width, device=device)).to(dtype) for _ in range(2 * case.norm)]
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    tables = [angle.cos().to(table_dtype), angle.sin().to(table_dtype)]
    return [q, k, v, normal(*cache_shape), normal(*cache_shape), lengths, *tables, *weights, *table]


def split(case, tensors):
    """The positional arguments and the keywords of append_kv."""
    names = ["q_norm_weight", "k_norm_weight"] * case.norm + ["block_table"] * bool(case.page_size)
    return list(tensors[:8]), dict(zip(names, tensors[8:], strict=True))


def runner(case, implementation="auto", function=append_kv):
    """A function of the tensors of `make` that leaves them alone and returns the queries and both caches."""

    def run(*tensors):
        arguments, options = split(case, tensors)
        arguments[3:5] = (cache.clone() for cache in arguments[3:5])
        if function is append_kv:
            options["implementation"] = implementation
        return function(*arguments, **options), arguments[3], arguments[4]

    return run


def reference(case):
    return runner(case, function=definition.append_kv)


def trials(case):
    size = max(1, len(case.lengths) * case.tokens * case.kv_heads * case.width)
    return max(1, min(32, 4096 // size))
