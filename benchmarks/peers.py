"""Other libraries' operators as contenders: how each is called, or one phrase on why it is not here.

Called as their documentation says, with the layouts of this library's operators outside and theirs inside. A peer that
is not installed, needs a GPU, or does not take a dtype is a phrase; whatever it raises or computes wrongly when called
is found by the harness. Nothing here is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[..., Any]
Peer = Call | str  # how to call it, or why it cannot be

LIGER, CUT, FLASH, XFORMERS, DIFFUSERS = "liger-kernel", "cut-cross-entropy", "flash-attn", "xformers", "diffusers"
MODULES = {
    LIGER: "liger_kernel",
    CUT: "cut_cross_entropy",
    FLASH: "flash_attn",
    XFORMERS: "xformers",
    DIFFUSERS: "diffusers",
}
ANYWHERE = (DIFFUSERS,)  # the others are made of GPU kernels
DTYPES = {FLASH: (torch.bfloat16, torch.float16)}


def peer(library: str, device: str, load: Callable[[], Call], dtype: torch.dtype | None = None) -> Peer:
    """What `load` gives, which imports the library; a phrase where that is of no use or fails."""
    if importlib.util.find_spec(MODULES[library]) is None:
        return "not installed"
    if device != "cuda" and library not in ANYWHERE:
        return "needs a GPU"
    if dtype is not None and dtype not in DTYPES.get(library, (dtype,)):
        return f"does not take {str(dtype).removeprefix('torch.')}"
    try:
        return load()
    except Exception as error:  # a broken installation may raise anything
        return f"cannot be imported: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def wrapped(found: Peer, wrap: Callable[[Call], Call]) -> Peer:
    """A phrase stays one."""
    return found if isinstance(found, str) else wrap(found)


def _liger(name: str) -> Call:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


# -- language ----------------------------------------------------------------------------------------------------------


def liger_rms_norm(device: str, eps: float) -> Peer:
    """(x [..., C], weight [C]) -> y"""

    def load() -> Call:
        liger = _liger("liger_rms_norm")
        # in_place would overwrite the gradient of y, which is another contender's, too.
        return lambda x, weight: liger(x, weight, eps, in_place=False)

    return peer(LIGER, device, load)


def liger_layer_norm(device: str, eps: float) -> Peer:
    """(x [..., C], weight [C], bias [C]) -> y"""

    def load() -> Call:
        liger = _liger("liger_layer_norm")
        return lambda x, weight, bias: liger(x, weight, bias, eps)

    return peer(LIGER, device, load)


def liger_swiglu(device: str) -> Peer:
    """(gate, up) -> silu(gate) * up"""
    return peer(LIGER, device, lambda: _liger("liger_swiglu"))


def liger_geglu(device: str) -> Peer:
    """x [..., 2 C] -> hidden * gelu(gate); its gelu is the approximation by tanh, of the first argument"""

    def load() -> Call:
        liger = _liger("liger_geglu")

        def run(x: torch.Tensor) -> torch.Tensor:
            hidden, gate = x.chunk(2, dim=-1)
            return liger(gate, hidden)

        return run

    return peer(LIGER, device, load)


def liger_rotary(device: str) -> Peer:
    """(q, k [B, H, T, D], cos, sin [1, T, D]) -> both turned; it overwrites them"""
    return peer(LIGER, device, lambda: _liger("liger_rope"))


def flash_rotary(device: str) -> Peer:
    """(q, k [B, H, T, D], cos, sin [1, T, D]) -> both turned; its tables are [T, D / 2] and its heads come after T"""

    def load() -> Call:
        apply = importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb

        def run(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
            half = cos.shape[-1] // 2
            tables = cos[0, :, :half], sin[0, :, :half]
            return tuple(apply(t.transpose(1, 2), *tables, interleaved=False).transpose(1, 2) for t in (q, k))

        return run

    return peer(FLASH, device, load)


def liger_linear_cross_entropy(device: str, ignored: int) -> Peer:
    """(hidden [T, C], weight [V, C], targets [T]) -> mean loss"""

    def load() -> Call:
        liger = _liger("liger_fused_linear_cross_entropy")
        return lambda hidden, weight, targets: liger(hidden, weight, targets, ignore_index=ignored)

    return peer(LIGER, device, load)


def cut_linear_cross_entropy(device: str, ignored: int) -> Peer:
    """(hidden [T, C], weight [V, C], targets [T]) -> mean loss"""

    def load() -> Call:
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda hidden, weight, targets: cut(hidden, weight, targets, ignore_index=ignored)

    return peer(CUT, device, load)


# -- attention ---------------------------------------------------------------------------------------------------------


def flash_attention(device: str, dtype: torch.dtype, causal: bool, lengths: Sequence[int] = ()) -> Peer:
    """(q, k, v) -> out, of [B, L, H, D], or of packed sequences of `lengths` as [sum, H, D]"""

    def load() -> Call:
        flash = importlib.import_module("flash_attn")
        if not lengths:
            return lambda q, k, v: flash.flash_attn_func(q, k, v, causal=causal)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
        longest = max(lengths)
        return lambda q, k, v: flash.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal)

    return peer(FLASH, device, load, dtype)


def xformers_attention(device: str, causal: bool, queries: int = 0, keys: int = 0, lengths: Sequence[int] = ()) -> Peer:
    """(q, k, v) -> out, of [B, L, H, D], or of packed sequences of `lengths` as [sum, H, D]"""

    def load() -> Call:
        ops = importlib.import_module("xformers.ops")
        masks = importlib.import_module("xformers.ops.fmha.attn_bias")
        bias: Any = None
        if lengths:
            bias = masks.BlockDiagonalMask.from_seqlens(list(lengths))
            bias = bias.make_causal() if causal else bias
        elif causal:
            bias = masks.LowerTriangularMask() if queries == keys else masks.LowerTriangularFromBottomRightMask()

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if not lengths:
                return ops.memory_efficient_attention(q, k, v, attn_bias=bias)
            return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

        return run

    return peer(XFORMERS, device, load)


def flash_decode(device: str, dtype: torch.dtype) -> Peer:
    """(q [B, T, H, D], cache_k, cache_v [B, P, G, D], lengths [B]) -> out; lengths count the newest queries' keys"""

    def load() -> Call:
        decode = importlib.import_module("flash_attn").flash_attn_with_kvcache
        return lambda q, k, v, lengths: decode(q, k, v, cache_seqlens=lengths, causal=True)

    return peer(FLASH, device, load, dtype)


# -- UNet --------------------------------------------------------------------------------------------------------------


def liger_group_norm_silu(device: str, groups: int, eps: float) -> Peer:
    """(x [B, C, H, W], weight [C], bias [C]) -> y; in channels-first layout, so others are copied"""

    def load() -> Call:
        liger = _liger("liger_group_norm")
        return lambda x, weight, bias: F.silu(liger(x, weight, bias, x.shape[1], groups, eps))

    return peer(LIGER, device, load)


def diffusers_geglu(device: str) -> Peer:
    """x [..., 2 C] -> hidden * gelu(gate): its module without the projection before"""

    def load() -> Call:
        module = importlib.import_module("diffusers.models.activations").GEGLU(1, 1)
        module.proj = torch.nn.Identity()
        return module

    return peer(DIFFUSERS, device, load)


def diffusers_add_noise(device: str, betas: dict[str, Any]) -> Peer:
    """(latents, noise, timesteps, table, dtype) -> noisy latents; the table is its scheduler's own"""

    def load() -> Call:
        scheduler = importlib.import_module("diffusers").DDPMScheduler(**betas)

        def run(
            latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, table: torch.Tensor, dtype: torch.dtype
        ) -> torch.Tensor:
            return scheduler.add_noise(latents, noise, timesteps).to(dtype)

        return run

    return peer(DIFFUSERS, device, load)


def diffusers_cross_attention(
    device: str,
    dtype: torch.dtype,
    heads: int,
    head_width: int,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    condition: torch.Tensor,
) -> Peer:
    """(x, residual [B, N, C]) -> the block's output; `weights` of queries, keys, values, output and its bias.

    Its module projects the condition [B, L, K] in every call.
    """

    def load() -> Call:
        attention = importlib.import_module("diffusers.models.attention_processor").Attention
        query, key, value, out, bias = weights
        module = attention(heads * head_width, key.shape[1], heads=heads, dim_head=head_width, bias=False)
        parts = {"to_q": query, "to_k": key, "to_v": value, "to_out.0": out}
        state = {f"{name}.weight": weight for name, weight in parts.items()} | {"to_out.0.bias": bias}
        module.load_state_dict(state)
        module = module.to(device, dtype).requires_grad_(False).eval()
        return lambda x, residual: module(x, encoder_hidden_states=condition) + residual

    return peer(DIFFUSERS, device, load)
