"""decode_layers against the same layers in eager PyTorch over a contiguous cache, and few_rows_linear against torch's
product."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import decode_layers, few_rows_linear
from dreamkernels.ops.operator import OPERATORS

FAMILY = "language"

# Sequences, layers, hidden, intermediate, heads, keys in the cache; the heads are 64 or 128 wide.
SHAPES = {
    "small": ((1, 4, 512, 1376, 8, 100), (8, 4, 512, 1376, 8, 100)),
    "working": ((1, 2, 4096, 11008, 32, 1000), (8, 2, 4096, 11008, 32, 1000)),
}
HEADS = {"small": (1, 512, 32000), "working": (8, 4096, 32008)}  # rows, hidden, vocabulary
PAGE = 16
Shape = tuple[int, int, int, int, int, int]


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    rows, layers, hidden, intermediate, heads, keys = shape
    sizes = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    weights = []
    for _ in range(layers):
        matrices = [torch.randn(*size, device=device).mul_(size[1] ** -0.5).to(dtype) for size in sizes]
        norms = torch.ones(2, hidden, device=device, dtype=dtype).unbind()
        weights += [norms[0], *matrices[:4], norms[1], *matrices[4:]]
    pages = keys // PAGE + 1
    cache = torch.randn(2 * layers, rows * pages, PAGE, heads, hidden // heads, device=device).to(dtype)
    table = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages)
    lengths = torch.full((rows,), keys, dtype=torch.int32, device=device)
    cos, sin = torch.randn(2, 2048, hidden // heads, device=device).to(dtype)
    x = torch.randn(rows, hidden, device=device).to(dtype)
    return [x, torch.ones(hidden, device=device, dtype=dtype), cache, lengths, table, cos, sin, *weights]


def ours(x: torch.Tensor, norm: torch.Tensor, cache: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    lengths, table, cos, sin, *weights = rest
    return decode_layers(x, weights, norm, cache, lengths, table, cos, sin)


def eager(x: torch.Tensor, norm: torch.Tensor, cache: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """As transformers does it; all sequences are equally long, and pages follow each other."""
    _, table, cos, sin, *weights = rest
    rows, pages = table.shape
    layers, heads, width = len(weights) // 9, cache.shape[3], cache.shape[4]
    keys = int(rest[0][0])
    for layer in range(layers):
        first, q, k, v, out, second, gate, up, down = weights[9 * layer : 9 * layer + 9]
        normed = F.rms_norm(x, x.shape[-1:], first, 1e-6)
        turned = [F.linear(normed, w).view(rows, heads, width) for w in (q, k, v)]
        query, key = (_rotate(t, cos[keys], sin[keys]) for t in turned[:2])
        flat = cache.view(2 * layers, rows, pages * PAGE, heads, width)
        flat[2 * layer, :, keys], flat[2 * layer + 1, :, keys] = key, turned[2]
        k_all, v_all = (flat[2 * layer + i, :, : keys + 1].transpose(1, 2) for i in range(2))
        attended = F.scaled_dot_product_attention(query[:, :, None], k_all, v_all)
        x = x + F.linear(attended.flatten(1), out)
        normed = F.rms_norm(x, x.shape[-1:], second, 1e-6)
        x = x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
    return F.rms_norm(x, x.shape[-1:], norm, 1e-6)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _tolerance(dtype: torch.dtype) -> float:
    return 6e-2 if dtype == torch.bfloat16 else 1e-4


def cases(device: str, size: str) -> Iterator[Case]:
    for shape in SHAPES[size]:
        rows, layers, hidden, intermediate, _, keys = shape
        weights = layers * (4 * hidden * hidden + 3 * hidden * intermediate)
        for dtype in (torch.bfloat16, torch.float32):
            yield Case(
                "decode_layers",
                f"{str(dtype).removeprefix('torch.')} {list(shape)}",
                _maker(shape, dtype, device),
                {"ours": ours, "eager": eager},
                (weights + 2 * layers * rows * keys * hidden) * dtype.itemsize,
                2 * rows * weights,
                _tolerance(dtype),
                device,
            )
    rows, hidden, vocabulary = HEADS[size]
    yield Case(
        "few_rows_linear",
        f"bfloat16 {list(HEADS[size])}",
        lambda: [torch.randn(n, hidden, device=device).bfloat16() for n in (rows, vocabulary)],
        {"ours": few_rows_linear, "torch": F.linear},
        2 * vocabulary * hidden,
        2 * rows * vocabulary * hidden,
        3e-2,
        device,
    )


def _maker(shape: Shape, dtype: torch.dtype, device: str) -> Callable[[], list[torch.Tensor]]:
    return lambda: inputs(shape, dtype, device)


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call of one tiny layer, where the kernels themselves cost almost nothing."""
    tensors = inputs((1, 1, 8, 8, 1, 4), torch.float32, device)
    x, norm, cache, lengths, table, cos, sin, *weights = tensors
    operator = OPERATORS["decode_layers"].overloads["default"]
    arguments = (x, weights, norm, cache, lengths, table, cos, sin, 1e-6, 1.0, -1)
    return {
        "decode_layers": cost_per_call_us(ours, tensors),
        "decode_layers, operator alone": cost_per_call_us(operator, arguments),
    }
