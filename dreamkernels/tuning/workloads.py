"""Calls that exercise each kernel of the launch tables, one set per bucket of shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreamkernels import ops
from dreamkernels.ops.operator import OPERATORS

Call = Callable[[], Any]
FLOAT32, BFLOAT16 = (torch.float32,), (torch.bfloat16,)
BOTH = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Bucket:
    """The widths and lengths that one entry serves: above the least, up to the most (None: any length)."""

    least_width: int
    max_width: int
    least_length: int = 0
    max_length: int | None = None

    def __str__(self) -> str:
        length = "" if self.max_length is None else f" length<={self.max_length}"
        return f"width<={self.max_width}{length}"


def buckets_of(entries: Sequence[Mapping[str, int]]) -> list[Bucket]:
    """The buckets of a kernel's entries, in their order."""
    found: list[Bucket] = []
    for entry in entries:
        width, length = entry["max_width"], entry.get("max_length")
        same = [bucket.max_length or 0 for bucket in found if bucket.max_width == width]
        narrower = [bucket.max_width for bucket in found if bucket.max_width < width and bucket.max_length is None]
        found.append(Bucket(max(narrower, default=0), width, max(same, default=0), length))
    return found


@dataclass(frozen=True)
class Size:
    """How large the calls are. Widths above `width` and lengths above `length` are used only where a bucket begins
    above them, so that an unlimited bucket is measured at a width that models have."""

    elements: int  # of the rows together
    width: int
    length: int
    heads: int
    vocabulary: int

    def width_of(self, bucket: Bucket) -> int:
        return min(bucket.max_width, max(self.width, bucket.least_width + 16))

    def length_of(self, bucket: Bucket) -> int:
        longest = max(self.length, bucket.least_length + 16)
        return longest if bucket.max_length is None else min(bucket.max_length, longest)

    def rows_of(self, width: int) -> int:
        return max(2, min(16384, self.elements // width))


WORKING = Size(elements=2**25, width=4096, length=2048, heads=16, vocabulary=32000)
SMALL = Size(elements=2**9, width=16, length=16, heads=2, vocabulary=64)  # for Triton's interpreter

Maker = Callable[[Bucket, torch.dtype, str, Size], Call]


@dataclass(frozen=True)
class Workload:
    operator: str  # the public function
    make: Maker
    dtypes: tuple[torch.dtype, ...] = BOTH  # those that the kernel's entries serve

    def calls(self, bucket: Bucket, device: str, size: Size = WORKING) -> list[Call]:
        with torch.random.fork_rng(devices=[] if device == "cpu" else None):
            torch.manual_seed(0)
            return [self.make(bucket, dtype, device, size) for dtype in self.dtypes]


def _backward(forward: Call, inputs: Sequence[torch.Tensor]) -> Call:
    """The gradients alone: the forward runs once, here."""
    for tensor in inputs:
        tensor.requires_grad_()
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _maker(build: Callable[..., tuple[Call, Sequence[torch.Tensor]]], backward: bool = False, **options: Any) -> Maker:
    def make(bucket: Bucket, dtype: torch.dtype, device: str, size: Size) -> Call:
        def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        forward, inputs = build(normal, bucket, size, **options)
        return _backward(forward, inputs) if backward else forward

    return make


def _rms_norm(normal, bucket, size):
    width = size.width_of(bucket)
    x, weight = normal(size.rows_of(width), width), normal(width)
    return lambda: ops.rms_norm(x, weight, 1e-6, implementation="triton"), (x, weight)


def _layer_norm(normal, bucket, size):
    width = size.width_of(bucket)
    x, weight, bias = normal(size.rows_of(width), width), normal(width), normal(width)
    return lambda: ops.layer_norm(x, weight, bias, 1e-5, "triton"), (x, weight, bias)


def _swiglu(normal, bucket, size):
    width = size.width_of(bucket)
    gate, up = (normal(size.rows_of(width), width) for _ in range(2))
    return lambda: ops.swiglu(gate, up, "triton"), (gate, up)


def _geglu(normal, bucket, size):
    width = size.width_of(bucket)
    x = normal(size.rows_of(width), 2 * width)
    return lambda: ops.geglu(x, "triton"), (x,)


def _attention(normal, bucket, size, mask="full"):
    width, length = min(size.width_of(bucket), bucket.max_width), size.length_of(bucket)
    pictures = max(1, size.elements // (8 * length * size.heads * width))
    q, k, v = (normal(pictures, length, size.heads, width) for _ in range(3))
    masks = {"full": {}, "causal": {"causal": True}, "band": {"causal": True, "window": max(8, length // 4)}}
    return lambda: ops.attention(q, k, v, **masks[mask], implementation="triton"), (q, k, v)


def _decode_attention(normal, bucket, size):
    width, keys = size.width_of(bucket), size.length
    batch = 8 if size is WORKING else 1
    q, k, v = (normal(batch, n, size.heads, width) for n in (1, keys, keys))
    filled = torch.full((batch,), keys, dtype=torch.int32, device=q.device)
    return lambda: ops.decode_attention(q, k, v, filled, implementation="triton"), ()


def _append_kv(normal, bucket, size):
    width, batch, tokens = size.width_of(bucket), 8 if size is WORKING else 1, 1
    q, k, v = (normal(batch, tokens, size.heads, width) for _ in range(3))
    k_cache, v_cache = (normal(batch, 64, size.heads, width) for _ in range(2))
    filled = torch.full((batch,), 8, dtype=torch.int32, device=q.device)
    cos, sin = (normal(64, width) for _ in range(2))

    def call() -> tuple[torch.Tensor, ...]:
        rotated = ops.append_kv(q, k, v, k_cache, v_cache, filled, cos, sin, implementation="triton")
        return rotated, k_cache[:, 8], v_cache[:, 8]

    return call, ()


def _rotary(normal, bucket, size):
    width = size.width_of(bucket)
    tokens = max(2, min(8192, size.rows_of(width) // 4))
    q, k = (normal(tokens, size.heads, width) for _ in range(2))
    cos, sin = (normal(tokens, width) for _ in range(2))
    return lambda: ops.rotary(q, k, cos, sin, implementation="triton"), ()


def _cross_conditioning(normal, bucket, size, keys_per_width=True):
    keys = min(128, bucket.max_width // 64) if keys_per_width else 64
    width = bucket.max_width // keys if keys_per_width else 64
    positions = 4096 if size is WORKING else 32
    q, k, v = (normal(2, n, 5, width) for n in (positions, keys, keys))
    return lambda: ops.cross_conditioning(q, k, v, implementation="triton"), (q, k, v)


def _linear_cross_entropy(normal, bucket, size, scaled=False, width_is_vocabulary=False):
    width = size.width if width_is_vocabulary else size.width_of(bucket)
    vocabulary = size.vocabulary
    if width_is_vocabulary:
        vocabulary = min(bucket.max_width, max(vocabulary, bucket.least_width + 16))
    hidden, weight = normal(4096 if size is WORKING else 8, width), normal(vocabulary, width)
    targets = torch.randint(vocabulary, (hidden.shape[0],), device=hidden.device)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())  # the forward computes the gradients, too
    return lambda: ops.linear_cross_entropy(*inputs, targets, implementation="triton"), inputs


def _splice(normal, bucket, size):
    width = size.width_of(bucket)
    rows = max(8, min(8192, size.rows_of(width)))
    tokens, pictures, queries = normal(rows, width), normal(rows // 4, width), normal(2, width)
    index = torch.full((rows,), -1, dtype=torch.int32)
    index[rows // 2 : rows // 2 + rows // 4 + 2] = torch.arange(rows // 4 + 2, dtype=torch.int32)
    index = index.to(tokens.device)
    inputs = (tokens, pictures, queries)
    return lambda: ops.splice_embeddings(tokens, [pictures, queries], index, "triton"), inputs


def _softmax_groups(normal, bucket, size):
    groups = max(4, min(2**20, size.elements // bucket.max_width))
    x = normal(groups, bucket.max_width)
    # A copy, since it works in place; it costs all candidates the same.
    return lambda: ops.softmax_groups_(x.clone(), x.shape[1], "triton"), ()


def _group_norm_silu(normal, bucket, size, kind="first"):
    if kind == "group":  # channels of a group by positions are the bucket's width
        channels, side = 128, 8 if bucket.max_width <= 4096 else 16
        x = normal(8 if size is WORKING else 1, channels, side, side)
        groups = channels * side * side // bucket.max_width or 1
    else:
        channels, side, groups = (320, 64, 32) if size is WORKING else (16, 48, 1)
        x = normal(2 if size is WORKING else 1, channels, side, side)
    if kind == "last":
        x = x.to(memory_format=torch.channels_last)
    weight, bias = normal(x.shape[1]), normal(x.shape[1])
    return lambda: ops.group_norm_silu(x, groups, weight, bias, implementation="triton"), (x, weight, bias)


def _guided_step(normal, bucket, size, rescale=0.0):
    samples, elements = (8, 4 * 64 * 64) if size is WORKING else (2, 40)
    latents, prediction = normal(samples, elements, dtype=torch.float32), normal(2 * samples, elements)
    table = torch.rand(3, 8, device=latents.device) + 0.5
    step = OPERATORS["guided_step"].overloads["triton"]
    return lambda: step(latents, prediction, table, 0, None, None, 5.0, rescale, None, None, False), ()


def _noise(normal, size):
    samples, elements = (32, 4 * 64 * 64) if size is WORKING else (2, 40)
    latents, noise = (normal(samples, elements, dtype=torch.float32) for _ in range(2))
    steps = torch.arange(samples, device=latents.device)
    return latents, noise, steps, torch.linspace(0.99, 0.1, 1000, device=latents.device), normal(samples, elements)


def _add_noise(normal, bucket, size):
    latents, noise, steps, schedule, like = _noise(normal, size)
    return lambda: ops.add_noise(latents, noise, steps, schedule, like.dtype, "triton"), ()


def _diffusion_loss(normal, bucket, size):
    latents, noise, steps, schedule, prediction = _noise(normal, size)
    return (
        lambda: ops.diffusion_loss(prediction, latents, noise, steps, schedule, implementation="triton"),
        (prediction,),
    )


def _attention_workloads() -> dict[str, Workload]:
    found = {}
    for kernel in ("forward", "keys", "queries"):
        backward = kernel != "forward"
        for mask in ("causal", "full", "band"):
            make = _maker(_attention, backward, mask=mask)
            found[f"attention_{kernel}_{mask}"] = Workload("attention", make, BFLOAT16)
        found[f"attention_{kernel}_float32"] = Workload("attention", _maker(_attention, backward), FLOAT32)
    found["attention_delta"] = Workload("attention", _maker(_attention, True), BFLOAT16)
    return found


def _split_by_dtype(kernel: str, operator: str, make: Maker) -> dict[str, Workload]:
    return {kernel: Workload(operator, make, BFLOAT16), f"{kernel}_float32": Workload(operator, make, FLOAT32)}


def _linear_cross_entropy_workloads() -> dict[str, Workload]:
    operator, make = "linear_cross_entropy", _maker(_linear_cross_entropy)
    found: dict[str, Workload] = {}
    for kernel in ("logits", "hidden_grad", "weight_grad"):
        found |= _split_by_dtype(f"linear_cross_entropy_{kernel}", operator, make)
    found["linear_cross_entropy_loss"] = Workload(operator, _maker(_linear_cross_entropy, width_is_vocabulary=True))
    found["linear_cross_entropy_gather"] = Workload(operator, make)
    found["linear_cross_entropy_scale"] = Workload(operator, _maker(_linear_cross_entropy, True))
    return found


# By kernel of the launch tables, most valuable first: a limit of time ends a run somewhere.
WORKLOADS: dict[str, Workload] = {
    "rms_norm_forward": Workload("rms_norm", _maker(_rms_norm)),
    "rms_norm_backward": Workload("rms_norm", _maker(_rms_norm, True)),
    "decode_attention": Workload("decode_attention", _maker(_decode_attention)),
    **_attention_workloads(),
    **_split_by_dtype("cross_conditioning_forward", "cross_conditioning", _maker(_cross_conditioning)),
    **_split_by_dtype("cross_conditioning_backward", "cross_conditioning", _maker(_cross_conditioning, True)),
    **_linear_cross_entropy_workloads(),
    "group_norm_silu_first": Workload("group_norm_silu", _maker(_group_norm_silu, kind="first")),
    "group_norm_silu_last": Workload("group_norm_silu", _maker(_group_norm_silu, kind="last")),
    "group_norm_silu_group": Workload("group_norm_silu", _maker(_group_norm_silu, kind="group")),
    "swiglu_forward": Workload("swiglu", _maker(_swiglu)),
    "swiglu_backward": Workload("swiglu", _maker(_swiglu, True)),
    "rotary": Workload("rotary", _maker(_rotary)),
    "append_kv": Workload("append_kv", _maker(_append_kv)),
    "layer_norm_forward": Workload("layer_norm", _maker(_layer_norm)),
    "layer_norm_backward": Workload("layer_norm", _maker(_layer_norm, True)),
    "geglu_forward": Workload("geglu", _maker(_geglu)),
    "geglu_backward": Workload("geglu", _maker(_geglu, True)),
    "splice_embeddings_forward": Workload("splice_embeddings", _maker(_splice)),
    "splice_embeddings_token_grad": Workload("splice_embeddings", _maker(_splice, True)),
    "splice_embeddings_gather_sum": Workload("splice_embeddings", _maker(_splice, True)),
    "softmax_groups": Workload("softmax_groups_", _maker(_softmax_groups)),
    "guided_step": Workload("guided_step", _maker(_guided_step)),
    "guided_step_moments": Workload("guided_step", _maker(_guided_step, rescale=0.7)),
    "add_noise": Workload("add_noise", _maker(_add_noise)),
    "diffusion_loss": Workload("diffusion_loss", _maker(_diffusion_loss)),
    "diffusion_loss_backward": Workload("diffusion_loss", _maker(_diffusion_loss, True)),
    "rms_norm_reduce": Workload("rms_norm", _maker(_rms_norm, True)),
    "layer_norm_reduce": Workload("layer_norm", _maker(_layer_norm, True)),
    "cross_conditioning_reduce": Workload(
        "cross_conditioning", _maker(_cross_conditioning, True, keys_per_width=False)
    ),
}


def operators() -> dict[str, list[str]]:
    """The kernels of every operator that can be tuned."""
    found: dict[str, list[str]] = {}
    for kernel, workload in WORKLOADS.items():
        found.setdefault(workload.operator, []).append(kernel)
    return found
