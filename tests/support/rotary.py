"""Inputs of the rotary tests."""

from dataclasses import dataclass

import torch

from dreamkernels.ops.rotary import reference, rotary_tables


@dataclass(frozen=True)
class Case:
    """A call in the layout "bhtd" is made as transformers makes it: from [B, T, H, D] by transpose(1, 2)."""

    layout: str = "bhtd"
    batch: int = 2
    tokens: int = 5
    q_heads: int = 4
    k_heads: int = 4
    width: int = 16
    rotated: int = 16
    positions: str = "none"  # or "shared" [T], "one" [1, T], "batch" [B, T]
    tables: str = "shared"  # [T, R]; "one" [1, T, R]; "batch" [B, T, R]
    wide_tables: bool = False  # float32 whatever q is

    def shape(self, heads):
        if self.layout == "thd":
            return (self.tokens, heads, self.width)
        return (self.batch, self.tokens, heads, self.width)


# Halves around the vectors of 8 and 16, heads around the groups of 8, tokens around the tiles of 32.
CASES = (
    Case(tokens=0),
    Case(batch=0),
    Case(k_heads=0),
    Case(batch=1, tokens=1, q_heads=1, k_heads=1, width=2, rotated=2),
    Case("thd", tokens=33, q_heads=9, k_heads=1, width=34, rotated=34),
    Case("thd", tokens=3, width=20, rotated=6, positions="shared"),
    Case("thd", tokens=3, width=64, rotated=64, positions="one", wide_tables=True),
    Case("bthd", tokens=4, q_heads=3, k_heads=1, width=40, rotated=30, tables="batch"),
    Case("bhtd", tokens=35, q_heads=8, k_heads=2, width=64, rotated=64, tables="one"),
    Case("bhtd", tokens=7, width=128, rotated=128, tables="batch", wide_tables=True),
    Case("bhtd", tokens=7, q_heads=17, width=18, rotated=10, positions="batch"),
    Case("bthd", tokens=70, q_heads=2, k_heads=1, positions="one", wide_tables=True),
)


def case_name(case):
    return case.layout if isinstance(case, Case) else None


def tables(case, dtype, device="cpu", positions_dtype=torch.int64):
    """(cos, sin, position_ids) of a case, with random distinct angles in both halves of a row."""
    dtype = torch.float32 if case.wide_tables else dtype
    if case.positions != "none":
        cos, sin = rotary_tables(2 * case.tokens + 3, case.rotated, dtype=dtype, device=device)
        shape = {"shared": (case.tokens,), "one": (1, case.tokens), "batch": (case.batch, case.tokens)}[case.positions]
        return cos, sin, torch.randint(0, len(cos), shape, device=device, dtype=positions_dtype)
    shape = {"shared": (), "one": (1,), "batch": (case.batch,)}[case.tables]
    angles = 6 * torch.rand((*shape, case.tokens, case.rotated), device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype), None


def states(case, dtype, device="cpu"):
    """q and k, which require gradients."""
    made = []
    for heads in (case.q_heads, case.k_heads):
        x = torch.randn(case.shape(heads), device=device).to(dtype).requires_grad_()
        made.append(x.transpose(1, 2).detach().requires_grad_() if case.layout == "bhtd" else x)
    return made


def expected(case, cos, sin, position_ids):
    """The reference as a function of q and k; in float64 the tables are, too."""

    def run(q, k):
        wide = q.dtype == torch.float64
        c, s = (cos.double(), sin.double()) if wide else (cos, sin)
        return reference.rotary(q, k, c, s, position_ids, case.layout == "bhtd")

    return run
