"""Folded cross-attention, for inference: what depends on the condition alone is multiplied once, not in every step.

With Q = x W_q^T and the output y = O W_o^T + b, the logits of head h are x (scale W_q,h^T K_h^T) and the output is the
sum over heads of P_h (V_h W_o,h^T). Both brackets are matrices of the condition: [channels, heads * keys] and
[heads * keys, channels]. With as many keys as a head has channels (64 dream queries) they are as large as W_q and W_o,
and a layer becomes product, softmax of every group of keys, product. The bias needs no pass of its own: the weights of
a head sum to one, so b / heads added to every row of V_h W_o,h^T gives b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamkernels.conditioning import DreamCondition
from dreamkernels.ops.softmax_groups import softmax_groups_

__all__ = ["FoldedCondition", "fold_condition", "folded_cross_conditioning", "folding_pays"]


@dataclass(frozen=True)
class FoldedCondition:
    """One layer's condition with the layer's own weights multiplied in.

    `query_key` [conditions, channels, heads * keys] makes logits from the layer's input, `value_out`
    [conditions, heads * keys, channels out] its output from the attention weights, bias included. Each condition serves
    `repeats` successive pictures.
    """

    query_key: Tensor
    value_out: Tensor
    keys: int
    repeats: int


def folding_pays(channels: int, keys: int, head_width: int, positions: int, steps: int) -> bool:
    """Whether a layer of so many channels and positions runs faster folded, over the steps that share a condition.

    With more keys than a head is wide the folded matrices are the larger ones. The attention that folding replaces is
    keys / channels of the products, so wide layers gain nothing, and folding itself takes as long as that attention at
    about as many positions as there are channels. Measured on a CPU (AVX-512, two threads) with SD 2.1's layers and 64
    keys, folded against unfolded time: 0.84 to 0.86 at 4096 x 320, 0.90 to 0.97 at 1024 x 640, no difference at
    256 x 1280 beyond the noise. Not measured on a GPU.
    """
    return keys <= head_width and channels < 1280 and positions * steps >= 8 * channels


def fold_condition(
    condition: DreamCondition,
    layer: int,
    weight_q: Tensor,
    weight_out: Tensor,
    bias_out: Tensor | None = None,
    scale: float | None = None,
) -> FoldedCondition:
    """Multiplies a layer's query and output weights into its keys and values, in float32, rounded once.

    Args:
        condition, layer: as for `DreamCondition.attend`.
        weight_q: [heads * head width, channels], as of diffusers' `to_q` (which has no bias).
        weight_out: [channels out, heads * head width]; bias_out: [channels out] or None, as of `to_out[0]`.
        scale: factor of the logits; head width ** -0.5 when None.

    Raises:
        ValueError: the weights do not fit the layer.
    """
    k, v = condition.key_value(layer)
    heads, width = k.shape[2:]
    if weight_q.dim() != 2 or weight_out.dim() != 2 or weight_q.shape[0] != heads * width:
        raise ValueError(
            f"layer {layer} has {heads} heads of width {width}: the query weight {list(weight_q.shape)} must be "
            f"[{heads * width}, channels] and the output weight {list(weight_out.shape)} a matrix, too"
        )
    if weight_out.shape[1] != heads * width or (bias_out is not None and bias_out.shape != weight_out.shape[:1]):
        raise ValueError(
            f"the output weight {list(weight_out.shape)} must be [channels, {heads * width}] and its bias [channels]"
        )
    scale = width**-0.5 if scale is None else scale
    queries = weight_q.detach().float().unflatten(0, (heads, width))
    outputs = weight_out.detach().float().unflatten(1, (heads, width))
    query_key = torch.einsum("bmhd,hdc->bchm", k.detach().float() * scale, queries).flatten(2)
    value_out = torch.einsum("bmhd,chd->bhmc", v.detach().float(), outputs).flatten(1, 2)
    if bias_out is not None:
        value_out += bias_out.detach().float() / heads
    dtype = condition.columns.dtype
    return FoldedCondition(query_key.to(dtype), value_out.to(dtype), k.shape[1], condition.repeats)


def folded_cross_conditioning(
    x: Tensor, folded: FoldedCondition, residual: Tensor | None = None, implementation: str = "auto"
) -> Tensor:
    """A whole cross-attention layer with a folded condition: query projection, attention, output projection, residual.

    Equal to the unfolded layer within rounding. For inference: it has no gradient.

    Args:
        x: [pictures, positions, channels], the layer's normalised input; dtype and device of the condition.
        residual: [pictures, positions, channels out], added to the result, or None.
        implementation: of `softmax_groups_`; the products are torch's.

    Raises:
        ValueError: shapes do not fit, the batch is not the condition's, or a gradient would be needed.
    """
    count, channels = folded.query_key.shape[:2]
    if x.dim() != 3 or x.shape[2] != channels or x.shape[0] != count * folded.repeats:
        raise ValueError(
            f"x {list(x.shape)} must be [{count * folded.repeats}, positions, {channels}]: the condition serves "
            f"{count} x {folded.repeats} pictures"
        )
    shape = (*x.shape[:2], folded.value_out.shape[2])
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual {list(residual.shape)} must have the shape of the result, {list(shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        raise ValueError(
            "the folded form has no gradient; call it under torch.no_grad(), or use DreamCondition.attend to train"
        )
    positions = folded.repeats * x.shape[1]
    logits = torch.bmm(x.reshape(count, positions, channels), folded.query_key)
    weights = softmax_groups_(logits, folded.keys, implementation)
    if residual is None:
        return torch.bmm(weights, folded.value_out).view(shape)
    return torch.baddbmm(residual.reshape(count, positions, shape[2]), weights, folded.value_out).view(shape)
