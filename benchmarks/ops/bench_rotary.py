"""rotary against transformers' apply_rotary_pos_emb, eager and compiled, Liger-Kernel and flash-attn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import rotary, rotary_tables
from dreamkernels.ops.operator import OPERATORS

FAMILY = "language"
# B, Hq, Hk, T, D
SHAPES = {
    "small": ((1, 16, 16, 2048, 64), (1, 32, 8, 512, 128)),
    "working": ((1, 32, 32, 8192, 128), (1, 32, 32, 16384, 128), (4, 32, 8, 2048, 128)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary(q, k, cos, sin)


def in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    with torch.no_grad():
        return rotary(q, k, cos, sin, inplace=True)


def with_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *grads: torch.Tensor) -> Any:
        turned = forward(q, k, cos, sin)
        return *turned, *torch.autograd.grad(turned, (q, k), grads)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    others = {peers.LIGER: peers.liger_rotary(device), peers.FLASH: peers.flash_rotary(device)}
    both_others = {name: peers.wrapped(call, with_backward) for name, call in others.items()}
    for batch, q_heads, k_heads, tokens, width in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            torch._dynamo.reset()
            forwards = {
                "ours": ours,
                "eager": apply_rotary_pos_emb,
                "torch.compile": torch.compile(apply_rotary_pos_emb, dynamic=False),
            }

            def states(heads: int, batch=batch, tokens=tokens, width=width, dtype=dtype) -> torch.Tensor:
                """As transformers makes them: [B, H, T, D] over memory [B, T, H, D]."""
                return torch.randn(batch, tokens, heads, width, device=device).to(dtype).transpose(1, 2)

            def plain(
                states=states, q_heads=q_heads, k_heads=k_heads, tokens=tokens, width=width, dtype=dtype
            ) -> list[torch.Tensor]:
                cos, sin = rotary_tables(tokens, width, dtype=dtype, device=device)
                return [states(q_heads), states(k_heads), cos[None], sin[None]]

            def differentiable(plain=plain, states=states, q_heads=q_heads, k_heads=k_heads) -> list[torch.Tensor]:
                q, k, cos, sin = plain()
                return [q.requires_grad_(), k.requires_grad_(), cos, sin, states(q_heads), states(k_heads)]

            elements = batch * tokens * (q_heads + k_heads) * width
            name = f"{str(dtype).removeprefix('torch.')} q [{batch}, {q_heads}, {tokens}, {width}]"
            name += "" if k_heads == q_heads else f", {k_heads} key heads"
            moved = 2 * elements * dtype.itemsize
            flops = 3 * elements
            tolerance = TOLERANCE[dtype]
            label = f"forward {name}"
            yield Case("rotary", label, plain, forwards, moved, flops, tolerance, device, peers=others)
            both = {contender: with_backward(call) for contender, call in forwards.items()}
            label = f"forward+backward {name}"
            yield Case(
                "rotary", label, differentiable, both, 2 * moved, 2 * flops, tolerance, device, peers=both_others
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on one token of two heads, where the kernel itself costs almost nothing."""
    q, k = torch.randn(2, 1, 2, 1, 64, device=device)
    cos, sin = rotary_tables(1, 64, device=device)
    table = cos[None], sin[None]
    tracked = q.clone().requires_grad_()
    operator = OPERATORS["rotary"].overloads["inference"]
    return {
        "x + x": cost_per_call_us(torch.add, (q, q)),
        "rotary": cost_per_call_us(ours, (q, k, *table)),
        "rotary, operator alone": cost_per_call_us(operator, (q, k, *table, None, True)),
        "rotary, recording a gradient": cost_per_call_us(ours, (tracked, k, *table)),
        "rotary, in place": cost_per_call_us(in_place, (q, k, *table)),
        "eager": cost_per_call_us(apply_rotary_pos_emb, (q, k, *table)),
        "eager, recording a gradient": cost_per_call_us(apply_rotary_pos_emb, (tracked, k, *table)),
    }
