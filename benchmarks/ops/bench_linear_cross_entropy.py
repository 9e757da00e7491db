"""linear_cross_entropy against logits in float32 (eager and torch.compile), Liger-Kernel and cut-cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import linear_cross_entropy

FAMILY = "language"
SHAPES = {"small": (1024, 512, 8192), "working": (8192, 4096, 32008)}  # tokens, width, vocabulary
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
IGNORED = -100


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORED)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        loss = forward(hidden, weight, targets)
        return loss, *torch.autograd.grad(loss, [t for t in (hidden, weight) if t.requires_grad])

    return run


def make_inputs(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, ignored: float = 0.0, weight_grad: bool = True
) -> list[torch.Tensor]:
    tokens, width, vocabulary = shape
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    targets[torch.randperm(tokens, device=device)[: int(ignored * tokens)]] = IGNORED
    return [hidden.requires_grad_(), weight.requires_grad_(weight_grad), targets]


def cases(device: str, size: str) -> Iterator[Case]:
    tokens, width, vocabulary = SHAPES[size]
    others = {
        peers.LIGER: peers.liger_linear_cross_entropy(device, IGNORED),
        peers.CUT: peers.cut_linear_cross_entropy(device, IGNORED),
    }
    for dtype, label, options in (
        (torch.bfloat16, "", {}),
        (torch.bfloat16, ", 75% ignored", {"ignored": 0.75}),
        (torch.bfloat16, ", frozen weight", {"weight_grad": False}),
        (torch.float32, "", {}),
    ):
        torch._dynamo.reset()
        forwards = {
            "ours": linear_cross_entropy,
            "eager": eager,
            "torch.compile": torch.compile(eager, dynamic=False),
        }
        products = 3 if options.get("weight_grad", True) else 2
        elements = (tokens + (vocabulary if products == 3 else 0)) * width  # of the gradients
        yield Case(
            "linear_cross_entropy",
            f"forward+backward {str(dtype).removeprefix('torch.')} {[tokens, width, vocabulary]}{label}",
            partial(make_inputs, device, SHAPES[size], dtype, **options),
            {name: with_backward(call) for name, call in forwards.items()},
            bytes_moved=((tokens + vocabulary) * width + elements) * dtype.itemsize,
            flops=int(2 * products * tokens * width * vocabulary * (1 - options.get("ignored", 0.0))),
            relative_tolerance=TOLERANCE[dtype],
            device=device,
            memory=True,
            peers={name: peers.wrapped(call, with_backward) for name, call in others.items()},
        )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call with four tokens, where the products cost almost nothing."""
    hidden, weight = torch.randn(4, 16, device=device), torch.randn(8, 16, device=device)
    targets = torch.randint(0, 8, (4,), device=device)
    tracked = hidden.clone().requires_grad_()
    return {
        "linear_cross_entropy": cost_per_call_us(linear_cross_entropy, (hidden, weight, targets)),
        "linear_cross_entropy, with backward": cost_per_call_us(
            with_backward(linear_cross_entropy), (tracked, weight, targets)
        ),
        "eager": cost_per_call_us(eager, (hidden, weight, targets)),
        "eager, with backward": cost_per_call_us(with_backward(eager), (tracked, weight, targets)),
    }
