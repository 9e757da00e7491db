"""attention against torch's scaled_dot_product_attention and eager attention, both padded where sequences are packed,
flash-attn and xformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import attention, explain
from dreamkernels.ops.attention.reference import visible_keys
from dreamkernels.ops.operator import OPERATORS

FAMILY = "attention"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
DOCUMENTS = {  # lengths in a pack of 2048 tokens, and in one of 8192
    "small": (37, 350, 512, 90, 301, 45, 128, 77, 260, 248),
    "working": (1876, 1433, 1102, 912, 770, 640, 512, 417, 300, 230),
}


@dataclass(frozen=True)
class Shape:
    """One problem: equal sequences (a dense batch), or documents of different lengths (packed)."""

    name: str
    heads: int
    head_dim: int
    queries: int = 0
    keys: int = 0
    batch: int = 1
    causal: bool = True
    constant_keys: int = 0
    documents: tuple[int, ...] = ()

    @property
    def pairs(self) -> int:
        """Of queries and visible keys, in all sequences."""
        lengths = [(n, n) for n in self.documents] or [(self.queries, self.keys)] * self.batch
        return sum(q * k - (q * (q - 1) // 2 if self.causal else 0) for q, k in lengths)


SHAPES = {
    "small": (
        Shape("causal 1024", 8, 64, 1024, 1024),
        Shape("causal 1024, width 16", 8, 16, 1024, 1024),
        Shape("packed documents", 8, 64, documents=DOCUMENTS["small"]),
        Shape("66 queries over 1500 keys", 8, 64, 66, 1500),
        Shape("64 queries over a frozen prefix of 300", 8, 64, 64, 364, constant_keys=300),
        Shape("UNet 16 x 16", 8, 64, 256, 256, batch=4, causal=False),
    ),
    "working": (
        Shape("causal 4 x 2048", 32, 128, 2048, 2048, batch=4),
        Shape("packed documents", 32, 128, documents=DOCUMENTS["working"]),
        Shape("66 queries over 1500 keys", 32, 128, 66, 1500, batch=8),
        Shape("64 queries over a frozen prefix of 100", 32, 128, 64, 164, batch=16, constant_keys=100),
        Shape("CLIP", 16, 64, 257, 257, batch=16, causal=False),
        Shape("UNet 64 x 64", 5, 64, 4096, 4096, batch=8, causal=False),
        Shape("UNet 32 x 32", 10, 64, 1024, 1024, batch=8, causal=False),
        Shape("UNet 16 x 16", 20, 64, 256, 256, batch=8, causal=False),
        Shape("UNet 8 x 8", 20, 64, 64, 64, batch=8, causal=False),
    ),
}

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Attend = Callable[..., torch.Tensor]  # (q, k, v) in the layout of the case -> out


def attend_by(shape: Shape, device: str, implementation: str) -> Attend:
    options: dict[str, Any] = {"causal": shape.causal, "implementation": implementation}
    if shape.constant_keys and implementation == "auto":
        options["constant_kv_prefix"] = torch.full(
            (shape.batch,), shape.constant_keys, dtype=torch.int32, device=device
        )
    if shape.documents:
        ends = torch.tensor([0, *shape.documents]).cumsum(0)
        cu_seqlens = ends.to(device=device, dtype=torch.int32)
        longest = max(shape.documents)
        options |= {f"cu_seqlens_{side}": cu_seqlens for side in "qk"} | {
            f"max_seqlen_{side}": longest for side in "qk"
        }
    return lambda q, k, v: attention(q, k, v, **options)


def mask_of(shape: Shape, device: str) -> torch.Tensor | None:
    """What SDPA needs beyond is_causal: where the last query meets the last key, and where sequences end."""
    if shape.documents:
        longest = max(shape.documents)
        length = torch.tensor(shape.documents, device=device)[:, None, None, None]
        position = torch.arange(longest, device=device)
        return (position[:, None] >= position) & (position < length)
    if shape.causal and shape.queries != shape.keys:
        return visible_keys(shape.queries, shape.keys, True, -1, torch.device(device))
    return None


def sdpa(shape: Shape, device: str, backends: list[SDPBackend] | None = None) -> Attend:
    mask = mask_of(shape, device)
    causal = shape.causal and mask is None

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if backends is None:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)

    return run


def eager(shape: Shape, device: str) -> Attend:
    mask = mask_of(shape, device)
    if mask is None and shape.causal:
        mask = visible_keys(shape.queries, shape.keys, True, -1, torch.device(device))
    hidden = None if mask is None else ~mask

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * shape.head_dim**-0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)

    return run


def contenders_of(shape: Shape, device: str) -> dict[str, tuple[Attend, bool]]:
    """Each with whether it takes the padded batch."""
    found = {"ours": (attend_by(shape, device, "auto"), False)}
    if device == "cpu":
        found["SDPA"] = (sdpa(shape, device), bool(shape.documents))
    return {**found, "eager": (eager(shape, device), bool(shape.documents))}


def peers_of(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, tuple[peers.Peer, bool]]:
    """As `contenders_of`. Which of torch's back ends takes a case, none says before it is asked."""
    found: dict[str, tuple[peers.Peer, bool]] = {}
    if device == "cuda":
        for name, backend in BACKENDS.items():
            found[f"SDPA {name}"] = (sdpa(shape, device, [backend]), bool(shape.documents))
    found[peers.FLASH] = (peers.flash_attention(device, dtype, shape.causal, shape.documents), False)
    mask = (shape.causal, shape.queries, shape.keys, shape.documents)
    return {**found, peers.XFORMERS: (peers.xformers_attention(device, *mask), False)}


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, differentiable: bool) -> list[torch.Tensor]:
    """q, k, v and the gradient of out; for packed documents followed by the same, padded."""
    rows = [shape.queries, shape.keys, shape.keys, shape.queries]
    if shape.documents:
        rows = [sum(shape.documents)] * 4
    leading = () if shape.documents else (shape.batch,)
    tensors = [torch.randn(*leading, n, shape.heads, shape.head_dim, device=device).to(dtype) for n in rows]
    if shape.documents:
        pieces = [list(tensor.split(list(shape.documents))) for tensor in tensors]
        tensors += [torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in pieces]
    for position in (0, 1, 2, 4, 5, 6):
        if differentiable and position < len(tensors):
            tensors[position].requires_grad_()
    return tensors


def contender(attend: Attend, shape: Shape, padded: bool, device: str, backward: bool) -> Callable[..., Any]:
    first = 4 if padded else 0
    valid = None
    if padded:
        longest = max(shape.documents)
        valid = (torch.arange(longest, device=device) < torch.tensor(shape.documents, device=device)[:, None]).flatten()
        valid = valid.nonzero()[:, 0]

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.detach() if valid is None else t.detach().flatten(0, 1)[valid]

    def run(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        q, k, v, grad = inputs[first : first + 4]
        out = attend(q, k, v)
        if not backward:
            return [rows(out)]
        grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), grad)
        grads = [grad_q, *(g[:, shape.constant_keys :] if shape.constant_keys else g for g in (grad_k, grad_v))]
        return [rows(out), *map(rows, grads)]

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    for shape in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            tokens = sum(shape.documents) or shape.batch * (shape.queries + shape.keys) // 2
            bytes_forward = 4 * tokens * shape.heads * shape.head_dim * dtype.itemsize
            flops = 4 * shape.pairs * shape.heads * shape.head_dim
            for what, passes in (("forward", 1), ("forward+backward", 3)):
                yield _case(shape, device, dtype, what, passes, bytes_forward, flops)


def _case(
    shape: Shape, device: str, dtype: torch.dtype, what: str, passes: int, bytes_forward: int, flops: int
) -> Case:
    backward = passes > 1

    def wrap(padded: bool) -> Callable[[Attend], Callable[..., Any]]:
        return lambda attend: contender(attend, shape, padded, device, backward)

    return Case(
        "attention",
        f"{what} {str(dtype).removeprefix('torch.')} {shape.name}",
        lambda: make_inputs(shape, dtype, device, backward),
        {name: wrap(padded)(attend) for name, (attend, padded) in contenders_of(shape, device).items()},
        passes * bytes_forward,
        flops * 7 // 2 if backward else flops,
        TOLERANCE[dtype],
        device,
        fallible=("eager",),  # its scores may not fit the memory
        peers={name: peers.wrapped(p, wrap(padded)) for name, (p, padded) in peers_of(shape, device, dtype).items()},
    )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [1, 2, 1, 8] tensor."""
    q = torch.randn(1, 2, 1, 8, device=device)
    arguments = (q, q, q, None, None, None, 2, 2, True, 0.35, -1, 0.0)
    operator = OPERATORS["attention"].overloads["inference"]
    return {
        f"attention ({explain(attention, q, q, q, causal=True).chosen})": cost_per_call_us(
            lambda: attention(q, q, q, causal=True), ()
        ),
        "attention, operator alone": cost_per_call_us(operator, arguments),
        "SDPA": cost_per_call_us(F.scaled_dot_product_attention, (q, q, q)),
    }
