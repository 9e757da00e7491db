"""Launches the attention kernels (triton_forward.py, triton_backward.py) and lists those that ship."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from dreamkernels.devices import architecture_of, launch_parameters, load_device
from dreamkernels.ops.attention.triton_backward import delta_kernel, keys_kernel, queries_kernel
from dreamkernels.ops.attention.triton_common import BAND, CAUSAL, FULL
from dreamkernels.ops.attention.triton_forward import forward_kernel
from dreamkernels.ops.launch import LAUNCH_OPTIONS, TRITON_DTYPES, ShippedKernel, on_device_of


def head_parts(head_dim: int, split: bool) -> tuple[int, int]:
    """HEAD and TAIL: powers of two, at least 16 as tensor cores need, that hold a head; with `split` least waste."""
    if not split:
        return max(16, triton.next_power_of_2(head_dim)), 0
    head = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - head
    if rest <= 0:
        return head, 0
    tail = max(16, triton.next_power_of_2(rest))
    return (2 * head, 0) if tail >= head else (head, tail)


def mask_of(causal: bool, window: int) -> tuple[int, int, int]:
    """The kind of mask, and how many keys before and after the aligned one are seen."""
    if window >= 0:
        return BAND.value, window - 1, 0 if causal else window - 1
    return (CAUSAL if causal else FULL).value, 0, 0


def _launch_table(kernel: str, dtype: torch.dtype, mask: int, softcap: bool) -> str:
    """The table of a kernel: what masks and caps cost in registers asks for other tiles."""
    if dtype == torch.float32:
        return f"attention_{kernel}_float32"
    kind = "band" if softcap or mask == BAND.value else "causal" if mask == CAUSAL.value else "full"
    return f"attention_{kernel}_{kind}"


def _constants(
    head_dim: int, dtype: torch.dtype, mask: int, softcap: bool, packed: bool, split: bool
) -> dict[str, Any]:
    head, tail = head_parts(head_dim, split)
    return {
        "MASK": mask,
        "PACKED": packed,
        "SOFTCAP": softcap,
        "D": head_dim,
        "HEAD": head,
        "TAIL": tail,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # the latter is ignored for 16-bit products
    }


class _Problem:
    """What the kernels of one call have in common."""

    def __init__(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlens, causal, scale, window, softcap) -> None:
        self.packed = cu_seqlens_q is not None
        self.q, self.k, self.v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        self.heads, self.head_dim = q.shape[-2:]
        self.kv_heads = k.shape[-2]
        self.mask, left, right = mask_of(causal, window)
        self.softcap = softcap > 0
        if self.packed:
            self.sequences = cu_seqlens_q.shape[0] - 1
            self.max_q, self.max_k = max_seqlens
            self.rows = q.shape[0]
            self.cu_seqlens = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
            strides = [(0, *t.stride()[:2]) for t in (self.q, self.k, self.v)]
        else:
            self.sequences, self.max_q, self.max_k = q.shape[0], q.shape[1], k.shape[1]
            self.rows = q.shape[1]
            self.cu_seqlens = (q, q)  # not read
            strides = [t.stride()[:3] for t in (self.q, self.k, self.v)]
        self.strides = [stride for triple in strides for stride in triple]
        self.sizes = (self.max_q, self.max_k, self.rows, self.heads, self.heads // self.kv_heads)
        self.numbers = (scale, softcap, left, right)
        self.architecture = architecture_of(q.device)

    def launch(self, kernel: Any, table: str, tiled: str, heads: int, *tensors: torch.Tensor, **constants: Any) -> None:
        """Runs a kernel on the tiles of queries or keys of every head of every sequence."""
        longest = self.max_q if tiled == "block_q" else self.max_k
        name = _launch_table(table, self.q.dtype, self.mask, self.softcap)
        chosen = launch_parameters(
            self.architecture, name, self.head_dim, triton.next_power_of_2(max(1, self.max_q, self.max_k))
        )
        tiles = triton.cdiv(longest, chosen[tiled])
        programs = tiles * heads * self.sequences
        if programs == 0:
            return
        kernel[(programs,)](
            *tensors,
            *self.strides,
            *self.sizes,
            tiles,
            *self.numbers,
            **_constants(
                self.head_dim, self.q.dtype, self.mask, self.softcap, self.packed, bool(chosen.get("split_heads"))
            ),
            **constants,
            BLOCK_Q=chosen["block_q"],
            BLOCK_K=chosen["block_k"],
            num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"],
            **LAUNCH_OPTIONS,
        )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    constant_kv_prefix: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    problem = _Problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), causal, scale, window, softcap
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse_shape = (q.shape[1], q.shape[0]) if problem.packed else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(lse_shape, dtype=torch.float32)
    tensors = (problem.q, problem.k, problem.v, out, lse, *problem.cu_seqlens)
    with on_device_of(q):
        problem.launch(forward_kernel, "forward", "block_q", problem.heads, *tensors)
    return out, lse


def attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    constant_kv_prefix: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = _Problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), causal, scale, window, softcap
    )
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta, shifted_lse = torch.empty((2, *lse.shape), dtype=torch.float32, device=q.device).unbind()
    inputs = (problem.q, problem.k, problem.v, grad_out, shifted_lse, delta)
    with on_device_of(q):
        _launch_delta(problem, out, grad_out, grad_lse, lse, delta, shifted_lse)
        prefix = problem.cu_seqlens[0] if constant_kv_prefix is None else constant_kv_prefix.contiguous()
        problem.launch(
            keys_kernel, "keys", "block_k", problem.kv_heads, *inputs, grad_k, grad_v, *problem.cu_seqlens, prefix,
            PREFIX=constant_kv_prefix is not None,
        )  # fmt: skip
        problem.launch(queries_kernel, "queries", "block_q", problem.heads, *inputs, grad_q, *problem.cu_seqlens)
    return grad_q, grad_k, grad_v


def _launch_delta(
    problem: _Problem,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    lse: torch.Tensor,
    delta: torch.Tensor,
    shifted_lse: torch.Tensor,
) -> None:
    if lse.numel() == 0:
        return
    chosen = launch_parameters(problem.architecture, "attention_delta", problem.head_dim)
    tiles = triton.cdiv(problem.rows, chosen["block_q"])
    delta_kernel[(tiles * lse.numel() // problem.rows,)](
        out,
        grad_out,
        lse if grad_lse is None else grad_lse,
        lse,
        delta,
        shifted_lse,
        problem.rows,
        problem.heads,
        tiles,
        LSE_GRAD=grad_lse is not None,
        D=problem.head_dim,
        WIDTH=triton.next_power_of_2(problem.head_dim),
        ROWS=chosen["block_q"],
        num_warps=chosen["num_warps"],
        **LAUNCH_OPTIONS,
    )


_POINTERS = {
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k": "*i32",
    "constant_kv_prefix": "*i32",
    "lse": "*fp32",
    "delta": "*fp32",
    "grad_lse": "*fp32",
    "shifted_lse": "*fp32",
}
_NUMBERS = {"scale": "fp32", "softcap": "fp32"}
_TENSORS = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")


def _shipped(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], entry: dict[str, int], blocks: dict[str, int]
) -> ShippedKernel:
    signature = {}
    for name in kernel.arg_names:
        if name in _TENSORS:
            signature[name] = f"*{TRITON_DTYPES[dtype]}"
        elif name not in constants and name not in blocks:
            signature[name] = _POINTERS.get(name) or _NUMBERS.get(name, "i32")
    return ShippedKernel(
        operator="attention" if kernel is forward_kernel else "attention_backward",
        kernel=kernel,
        dtype=dtype,
        width=entry["max_width"],
        signature=signature,
        constants={**constants, **blocks},
        num_warps=entry["num_warps"],
        divisible_by_16=tuple(name for name in signature if name.endswith("_stride")),
        num_stages=entry.get("num_stages"),
    )


_SHIPPED_HEAD_DIMS = (32, 40, 64, 80, 96, 128)
# dtype, mask, softcap, packed, and the head widths at which this kind of call is compiled
_SHIPPED_CALLS = (
    (torch.bfloat16, CAUSAL, False, True, _SHIPPED_HEAD_DIMS),
    (torch.bfloat16, FULL, False, False, _SHIPPED_HEAD_DIMS),
    (torch.bfloat16, BAND, False, True, (64, 128)),
    (torch.bfloat16, CAUSAL, True, True, (64, 128)),
    (torch.float16, FULL, False, False, (64,)),
    (torch.float32, CAUSAL, False, True, (128,)),
    (torch.float32, FULL, False, False, (64,)),
)


def _entries(table: list[dict[str, int]], head_dim: int) -> Iterator[dict[str, int]]:
    """What serves a head width, for every bucket of lengths."""
    for entry in table:
        if head_dim <= entry["max_width"]:
            yield entry
            if "max_length" not in entry:
                return


def shipped_kernels(architecture: str) -> Iterator[ShippedKernel]:
    """The kernels at every launch parameter, for the native head widths and every kind of call."""
    launch = load_device(architecture).launch
    for dtype, mask, softcap, packed, head_dims in _SHIPPED_CALLS:
        for head_dim in head_dims:
            for name, kernel in (("forward", forward_kernel), ("keys", keys_kernel), ("queries", queries_kernel)):
                more = {"PREFIX": packed} if kernel is keys_kernel else {}
                for entry in _entries(launch[_launch_table(name, dtype, mask.value, softcap)], head_dim):
                    split = bool(entry.get("split_heads"))
                    constants = {**_constants(head_dim, dtype, mask.value, softcap, packed, split), **more}
                    blocks = {"BLOCK_Q": entry["block_q"], "BLOCK_K": entry["block_k"]}
                    yield _shipped(kernel, dtype, constants, {**entry, "max_width": head_dim}, blocks)
    for head_dim in (64, 128):
        (entry,) = _entries(launch["attention_delta"], head_dim)
        constants = {"LSE_GRAD": True, "D": head_dim, "WIDTH": triton.next_power_of_2(head_dim)}
        yield _shipped(
            delta_kernel, torch.bfloat16, constants, {**entry, "max_width": head_dim}, {"ROWS": entry["block_q"]}
        )
