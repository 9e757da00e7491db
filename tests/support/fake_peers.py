"""Stand-ins for libraries that need a GPU: public signatures, what they compute, and the layouts they insist on."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F

from dreamkernels.ops.attention.reference import visible_keys


def install(monkeypatch, called):
    """Puts all of them into sys.modules; names of the functions that are called go into the set `called`."""
    modules = {
        "liger_kernel": {},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.functional": LIGER,
        "cut_cross_entropy": {"linear_cross_entropy": cut_linear_cross_entropy},
        "flash_attn": FLASH,
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": MASKS,
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for attribute, value in content.items():
            setattr(module, attribute, value if isinstance(value, type) else _noting(value, called))
        monkeypatch.setitem(sys.modules, name, module)


def _noting(function, called):
    def run(*arguments, **options):
        called.add(function.__name__)
        return function(*arguments, **options)

    return run


# -- liger_kernel.transformers.functional ------------------------------------------------------------------------------


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place, "it would overwrite the gradient that contenders share"
    wide = X.float()
    return W * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(X.dtype)


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_swiglu(a, b):
    return F.silu(a) * b


def liger_geglu(a, b):
    return F.gelu(a, approximate="tanh") * b


class _Turned(torch.autograd.Function):
    """Turns its inputs in their own memory, as Liger-Kernel does, without telling autograd."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn_in_place(q, cos, sin), _turn_in_place(k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _turn_in_place(dq, cos, -sin), _turn_in_place(dk, cos, -sin), None, None


def _turn_in_place(x, cos, sin):
    memory = x.detach()
    a, b = memory.chunk(2, -1)
    memory.copy_(memory * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None])
    return memory


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    tokens, width = q.shape[2:]
    assert k.shape[2:] == (tokens, width), "[batch, heads, tokens, width]"
    assert cos.shape == sin.shape == (1, tokens, width)
    return _Turned.apply(q, k, cos, sin)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    assert X.shape[1] == num_channels
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None,
):  # fmt: skip
    assert input.shape[1] == weight.shape[1]
    return F.cross_entropy((input @ weight.T).float(), target, ignore_index=ignore_index, reduction=reduction)


LIGER = {
    function.__name__: function
    for function in (
        liger_rms_norm,
        liger_layer_norm,
        liger_swiglu,
        liger_geglu,
        liger_rope,
        liger_group_norm,
        liger_fused_linear_cross_entropy,
    )
}


def cut_linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"
):
    assert e.shape[:-1] == targets.shape
    return F.cross_entropy((e @ c.T).float(), targets, ignore_index=ignore_index, reduction=reduction)


# -- flash_attn --------------------------------------------------------------------------------------------------------


def _attend(q, k, v, causal):
    """[B, L, H, D]; the last query meets the last key."""
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    mask = visible_keys(q.shape[1], k.shape[1], causal, -1, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped).transpose(1, 2)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    assert q.dtype != torch.float32
    assert q.dim() == 4
    assert q.shape[2:] == k.shape[2:] == v.shape[2:]
    return _attend(q, k, v, causal)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert q.dtype != torch.float32
    assert q.dim() == 3
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    lengths = cu_seqlens_q.diff().tolist()
    assert cu_seqlens_k.diff().tolist() == lengths
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    pieces = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    return torch.cat([_attend(*(t[None] for t in piece), causal)[0] for piece in pieces])


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
):  # fmt: skip
    assert q.dtype != torch.float32
    assert k is None
    assert cache_seqlens.dtype == torch.int32
    rows = [
        _attend(q[i : i + 1], k_cache[i : i + 1, :length], v_cache[i : i + 1, :length], causal)
        for i, length in enumerate(cache_seqlens.tolist())
    ]
    return torch.cat(rows)


FLASH = {function.__name__: function for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)}


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    """x [batch, tokens, heads, width]; tables [tokens, width / 2]"""
    assert not interleaved
    assert cos.shape == sin.shape == (x.shape[1], x.shape[3] // 2)
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# -- xformers ----------------------------------------------------------------------------------------------------------


class LowerTriangularMask:
    """The first query meets the first key."""


class LowerTriangularFromBottomRightMask:
    """The last query meets the last key."""


class BlockDiagonalMask:
    def __init__(self, lengths, causal=False):
        self.lengths, self.causal = lengths, causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert isinstance(q_seqlen, list)
        return cls(q_seqlen)

    def make_causal(self):
        return BlockDiagonalMask(self.lengths, causal=True)


MASKS = {kind.__name__: kind for kind in (LowerTriangularMask, LowerTriangularFromBottomRightMask, BlockDiagonalMask)}


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert query.dim() == key.dim() == 4, "[batch, tokens, heads, width]"
    assert query.shape[2] == key.shape[2]
    if isinstance(attn_bias, BlockDiagonalMask):
        assert len(query) == 1
        pieces = zip(*(t.split(attn_bias.lengths, dim=1) for t in (query, key, value)), strict=True)
        return torch.cat([_attend(*piece, attn_bias.causal) for piece in pieces], dim=1)
    if isinstance(attn_bias, LowerTriangularMask):
        assert query.shape[1] == key.shape[1]
    return _attend(query, key, value, attn_bias is not None)
