"""decode_attention against torch's scaled_dot_product_attention on the same cache, torch.compile of that, and
flash-attn's attention over a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Call, Case, cost_per_call_us
from dreamkernels import decode_attention
from dreamkernels.ops.operator import OPERATORS

FAMILY = "attention"

# Sequences, new tokens, query heads, key heads, keys: the dream queries with their two marks and one token of LLaMA-7B,
# batches, grouped heads, a long cache with few heads.
SHAPES = {
    "small": ((1, 66, 32, 32, 1500), (1, 1, 32, 32, 1500), (8, 1, 32, 8, 700)),
    "working": (
        (1, 66, 32, 32, 1500),
        (1, 1, 32, 32, 1500),
        (32, 1, 32, 32, 2048),
        (8, 1, 32, 8, 700),
        (1, 1, 8, 2, 8000),
    ),
}
WIDTH = 128


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return decode_attention(q, k, v, lengths)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """All sequences have the length of the mask, which torch needs for queries at the end of their keys."""
    keys = mask.shape[-1]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k[:, :keys].transpose(1, 2),
        v[:, :keys].transpose(1, 2),
        attn_mask=None if q.shape[1] == 1 else mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def without_mask(call: Call) -> Call:
    return lambda q, k, v, lengths, mask: call(q, k, v, lengths)


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    batch, tokens, q_heads, kv_heads, keys = shape
    q = torch.randn(batch, tokens, q_heads, WIDTH, device=device).to(dtype)
    k, v = torch.randn(2, batch, keys + 64, kv_heads, WIDTH, device=device).to(dtype)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    mask = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
    return [q, k, v, lengths, mask]


def cases(device: str, size: str) -> Iterator[Case]:
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32) if shape[0] == 1 and shape[2] == 32 else (torch.bfloat16,):
            flash = peers.wrapped(peers.flash_decode(device, dtype), without_mask)
            torch._dynamo.reset()
            batch, tokens, q_heads, kv_heads, keys = shape
            moved = (2 * batch * keys * kv_heads + 2 * batch * tokens * q_heads) * WIDTH * dtype.itemsize
            yield Case(
                "decode_attention",
                f"forward {str(dtype).removeprefix('torch.')} {list(shape)}",
                lambda shape=shape, dtype=dtype: inputs(shape, dtype, device),
                {"ours": ours, "sdpa": sdpa, "torch.compile": torch.compile(sdpa, dynamic=False)},
                moved,
                4 * batch * tokens * q_heads * keys * WIDTH,
                3e-2 if dtype == torch.bfloat16 else 1e-4,
                device,
                peers={peers.FLASH: flash},
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call with a few keys, where the kernel itself costs almost nothing."""
    tensors = inputs((1, 1, 2, 2, 4), torch.float32, device)
    operator = OPERATORS["decode_attention"].overloads["default"]
    return {
        "decode_attention": cost_per_call_us(ours, tensors),
        "decode_attention, operator alone": cost_per_call_us(
            operator, (*tensors[:4], None, True, WIDTH**-0.5, -1, 0.0, 0)
        ),
        "sdpa": cost_per_call_us(sdpa, tensors),
    }
