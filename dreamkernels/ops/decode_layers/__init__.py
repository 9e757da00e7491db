"""decode_layers: one new token of each of several sequences through all layers of a LLaMA decoder, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dreamkernels.ops.decode_layers import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, choose, define, overload_for, row_major_like

__all__ = ["WEIGHTS_OF_A_LAYER", "decode_layers", "few_rows_linear"]

WEIGHTS_OF_A_LAYER = ("attention_norm", "q", "k", "v", "out", "mlp_norm", "gate", "up", "down")

DECODE_LAYERS = define(
    "decode_layers",
    "(Tensor x, Tensor[] weights, Tensor norm_weight, Tensor(a!) kv_cache, Tensor positions, Tensor block_table, "
    "Tensor cos, Tensor sin, float eps, float scale, int window) -> Tensor",
    fake=lambda x, *_: row_major_like(x),
)
FEW_ROWS_LINEAR = define(
    "few_rows_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
)


def _refuse_gradient(name: str, *tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{name} has no gradient, but an argument requires one; call it under torch.no_grad()")


def decode_layers(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    norm_weight: torch.Tensor,
    kv_cache: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    scale: float | None = None,
    window: int | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """All layers of a decoder with LLaMA's layout, for one new token of each sequence, over a key-value cache in pages.

    Per layer: `rms_norm`, query, key and value products, `append_kv`, `decode_attention`, output product, `rms_norm`
    with the residual add, gate and up products with `swiglu`, down product; a norm at the end. Sums are float32 and
    results round to the dtype of x where those operators round. A token's result does not depend on the others by a
    bit. On a CPU this is one parallel region and reads every weight once, in the layout it has.

    Args:
        x: [B, hidden], embeddings of the new tokens; float32, bfloat16 or float16.
        weights: nine contiguous tensors of the dtype of x per layer, in the order of `WEIGHTS_OF_A_LAYER`:
            attention_norm [hidden], q [Hq D, hidden], k and v [Hk D, hidden], out [hidden, Hq D], mlp_norm [hidden],
            gate and up [I, hidden], down [hidden, I].
        norm_weight: [hidden], of the norm at the end.
        kv_cache: [2 L, pages, page_size, Hk, D], of each layer the keys and then the values. Written in place.
        positions: int32 [B], the tokens of each sequence in the cache before the call. It is not advanced.
        block_table: int32 [B, max_pages], as in `append_kv`.
        cos, sin: [positions, R], as in `append_kv`. Their number of rows is a property of the model: by it, and not by
            the call, keys are divided among cores.
        eps: of all norms.
        scale: of the scores; None: 1 / sqrt(D).
        window: as in `decode_attention`; None: all keys are seen.
        implementation: "auto" (CPU: C++), or one of "cpu", "reference". There is no GPU kernel; the operators it is
            made of have them.

    Returns:
        [B, hidden], the states after the last norm. For inference: there is no gradient.

    Raises:
        ValueError: the dtype is not supported, a tensor requires a gradient while one is recorded, or the
            implementation cannot run on the device.
        RuntimeError: a tensor does not fit (which and how), a position is beyond the cache or the tables, or a page
            does not exist; the cache is then unchanged.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, which decode_layers does not support (float32, bfloat16, float16); cast it"
        )
    _refuse_gradient("decode_layers", x, norm_weight, kv_cache, *weights)
    scale = kv_cache.shape[-1] ** -0.5 if scale is None else scale
    arguments = (x, list(weights), norm_weight, kv_cache, positions, block_table, cos, sin, eps, scale)
    chosen = choose(DECODE_LAYERS.name, implementation, x.device.type)
    if chosen == "reference":
        return reference.decode_layers(*arguments, -1 if window is None else window)
    return overload_for(DECODE_LAYERS, chosen, needs_grad=False)(*arguments, -1 if window is None else window)


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """x weight^T + bias for few rows of x, limited by reading the weight once, in the layout it has.

    A row's result does not depend on the others by a bit. With many rows (some dozens) a library's product is faster.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        weight: [N, K], dtype of x.
        bias: [N], dtype of x, or None.
        implementation: "auto" (CPU: C++), or one of "cpu", "reference".

    Returns:
        [M, N], contiguous, summed in float32 and rounded once. For inference: there is no gradient.

    Raises:
        ValueError: shapes or dtypes do not fit, a tensor requires a gradient while one is recorded, or the
            implementation cannot run on the device.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}, which few_rows_linear does not support (float32, bfloat16, float16); cast it"
        )
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"x {list(x.shape)} {x.dtype} and weight {list(weight.shape)} {weight.dtype} must be [M, K] and [N, K] of "
            "one dtype"
        )
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != x.dtype):
        raise ValueError(f"bias {list(bias.shape)} {bias.dtype} must be [{weight.shape[0]}] of the dtype of x")
    _refuse_gradient("few_rows_linear", x, weight, bias)
    chosen = choose(FEW_ROWS_LINEAR.name, implementation, x.device.type)
    if chosen == "reference":
        return reference.few_rows_linear(x, weight, bias)
    return overload_for(FEW_ROWS_LINEAR, chosen, needs_grad=False)(x, weight, bias)
