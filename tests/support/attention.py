"""Inputs of the attention tests."""

from dataclasses import dataclass, field

import torch

from dreamkernels import attention
from dreamkernels.ops.attention import reference as definition


@dataclass(frozen=True)
class Problem:
    """One call. `lengths` are (queries, keys) of each sequence; a dense batch has equal ones."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    packed: bool = True
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    prefix: tuple[int, ...] | None = None
    layout: str = field(default="contiguous")  # or "projection": q, k, v are slices of one; or "transposed"

    @property
    def values(self) -> int:
        return sum(q for q, _ in self.lengths) * self.heads * self.head_dim

    def cu_seqlens(self, side: int, device="cpu") -> torch.Tensor:
        bounds = torch.tensor([0, *(pair[side] for pair in self.lengths)]).cumsum(0)
        return bounds.to(device=device, dtype=torch.int32)

    def _tensor(self, side: int, heads: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        shape = (sum(pair[side] for pair in self.lengths), heads, self.head_dim)
        if not self.packed:
            shape = (len(self.lengths), self.lengths[0][side], heads, self.head_dim)
        if self.layout == "transposed":  # [.., H, T, D] in memory
            swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
            made = torch.randn(swapped, device=device).to(dtype).transpose(-3, -2)
        elif self.layout == "projection":  # between other columns of a wider tensor
            wide = torch.randn((*shape[:-2], heads + 2, self.head_dim), device=device).to(dtype)
            made = wide[..., 1:-1, :]
        else:
            made = torch.randn(shape, device=device).to(dtype)
        return made.detach().requires_grad_()

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
        return [
            self._tensor(side, heads, dtype, device)
            for side, heads in ((0, self.heads), (1, self.kv_heads), (1, self.kv_heads))
        ]

    def options(self, device: str = "cpu") -> dict:
        found = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if self.prefix is not None:
            found["constant_kv_prefix"] = torch.tensor(self.prefix, dtype=torch.int32, device=device)
        if self.packed:
            found["cu_seqlens_q"], found["cu_seqlens_k"] = self.cu_seqlens(0, device), self.cu_seqlens(1, device)
            found["max_seqlen_q"] = max((q for q, _ in self.lengths), default=0)
            found["max_seqlen_k"] = max((k for _, k in self.lengths), default=0)
        return found

    def run(self, implementation: str, return_lse: bool = True, device: str = "cpu"):
        """A function of q, k, v."""

        def call(q, k, v):
            options = self.options(device)
            return attention(q, k, v, return_lse=return_lse, implementation=implementation, **options)

        return call

    def reference(self, return_lse: bool = True, device: str = "cpu"):
        """The definition, in the dtype of its inputs; also float64, which the public function does not take."""
        options = self.options(device)
        lengths = (options.get("cu_seqlens_q"), options.get("cu_seqlens_k"), options.get("constant_kv_prefix"))
        mask = (self.causal, self.head_dim**-0.5, self.window or -1, self.softcap or 0.0)

        def call(q, k, v):
            out, lse = definition.attention(q, k, v, *lengths, *mask)
            return (out, lse) if return_lse else out

        return call

    def trials(self, dtype: torch.dtype) -> int:
        """Enough repetitions that the largest error is not luck; most in float32, where ours and eager's are close."""
        values = 6000 if dtype == torch.float32 else 3000
        return max(1, min(20, values // max(1, self.values)))


def pairs(*lengths: int) -> tuple[tuple[int, int], ...]:
    """Sequences with as many queries as keys."""
    return tuple((length, length) for length in lengths)


# Real shapes scaled down, every option, ragged ends, empty sequences on either side, rows that see nothing.
CASES = {
    "LLaMA pack": Problem(pairs(70, 33, 1, 100), 4, 4, 128, causal=True),
    "grouped heads": Problem(pairs(65, 40), 6, 2, 64, causal=True, layout="projection"),
    "CLIP": Problem(pairs(50, 50), 3, 3, 64, packed=False, layout="transposed"),
    "UNet self": Problem(pairs(256), 2, 2, 64, packed=False),
    "UNet cross": Problem(((100, 64),) * 2, 2, 2, 40, packed=False),
    "queries over a cache": Problem(((64, 130), (5, 130)), 2, 2, 80, causal=True, prefix=(66, 130)),
    "more queries than keys": Problem(((40, 7), (3, 1)), 2, 1, 32, causal=True),
    "empty": Problem(((0, 5), (6, 0), (0, 0), (9, 9)), 2, 1, 16, causal=True),
    "causal window": Problem(pairs(90, 20), 2, 2, 96, causal=True, window=17),
    "window": Problem(((60, 90), (90, 60)), 2, 1, 48, window=9),
    "softcap": Problem(pairs(33, 70), 2, 2, 72, softcap=1.5, causal=True),
    "odd width": Problem(((30, 31),), 3, 1, 19, packed=False, causal=True),
}
