"""linear_cross_entropy: the loss of a language-model head without its logits.

With a scalar loss the gradients are made in the forward pass, chunk by chunk, while the logits of the chunk exist:
three matrix products in all. The backward multiplies them by the gradient of the loss. With a loss per row that
gradient must enter before the sum over rows, and in float16 before rounding (it carries the loss scale): there the
backward makes the logits of each chunk again, which is a fourth product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dreamkernels.ops.debug import check_range, debug_enabled
from dreamkernels.ops.linear_cross_entropy import reference
from dreamkernels.ops.operator import FLOAT_DTYPES, Autograd, choose, define, overload_for

__all__ = ["linear_cross_entropy"]

_TRITON = "dreamkernels.ops.linear_cross_entropy.triton"
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _fake_gradients(hidden, weight, hidden_grad, weight_grad):
    return (
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
    )


def _fake(hidden, weight, targets, ignore_index, reduction, softcap, z_loss, chunk, hidden_grad, weight_grad):
    shape = targets.shape if reduction == REDUCTIONS["none"] else ()
    loss = hidden.new_empty(shape, dtype=torch.float32)
    return loss, *_fake_gradients(hidden, weight, hidden_grad, weight_grad)


def _fake_backward(
    grad_loss, hidden, weight, targets, ignore_index, reduction, softcap, z_loss, chunk, hidden_grad, weight_grad
):
    return _fake_gradients(hidden, weight, hidden_grad, weight_grad)


_OPTIONS = (
    "int ignore_index, int reduction, float softcap, float z_loss, SymInt chunk, bool hidden_grad, bool weight_grad"
)
BACKWARD = define(
    "linear_cross_entropy_backward",
    f"(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_backward,
    triton=f"{_TRITON}:linear_cross_entropy_backward",
)
SCALE = define(
    "linear_cross_entropy_scale",
    "(Tensor(a!) grad_hidden, Tensor(b!) grad_weight, Tensor grad_loss) -> ()",
    fake=lambda grad_hidden, grad_weight, grad_loss: None,
    triton=f"{_TRITON}:linear_cross_entropy_scale",
)


def _save(ctx, inputs, output):
    hidden, weight, targets, *ctx.options, hidden_grad, weight_grad = inputs
    _, grad_hidden, grad_weight = output
    ctx.save_for_backward(hidden, weight, targets)
    # Not among the saved tensors: the first backward gives them away instead of copying them.
    ctx.made, ctx.has = (grad_hidden, grad_weight), (hidden_grad, weight_grad)
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)


def _backward(backward: Any) -> Callable[..., Any]:
    scale = SCALE.overloads["triton" if backward is BACKWARD.overloads["triton"] else "default"]

    def run(ctx, grad_loss, *_):
        needs = tuple(ctx.needs_input_grad[:2])
        if grad_loss is None:
            return (None,) * 10
        if ctx.has == needs:
            made, ctx.made, ctx.has = ctx.made, None, None
            if type(grad_loss) is not torch.Tensor:  # traced: a graph of the backward must not change the forward's
                made = tuple(gradient.clone() for gradient in made)
            scale(*made, grad_loss)
        else:  # not made yet, or given away by an earlier backward through the same graph
            made = backward(grad_loss, *ctx.saved_tensors, *ctx.options, *needs)
        return *(gradient if wanted else None for gradient, wanted in zip(made, needs, strict=True)), *(None,) * 8

    return run


LINEAR_CROSS_ENTROPY = define(
    "linear_cross_entropy",
    f"(Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    triton=f"{_TRITON}:linear_cross_entropy",
    autograd=Autograd(_backward, _save, BACKWARD),
)


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    if hidden.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"hidden has dtype {hidden.dtype}, which linear_cross_entropy does not support "
            "(float32, bfloat16, float16); cast it"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}; cast one, or use autocast")
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} must be [..., H] and weight {list(weight.shape)} [V, H]")
    if weight.numel() == 0:
        raise ValueError(f"weight {list(weight.shape)} is empty; vocabulary and width must be at least one")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets {list(targets.shape)} must be {list(hidden.shape[:-1])}, one per row of hidden "
            f"{list(hidden.shape)}"
        )
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets has dtype {targets.dtype} (int32 or int64); cast it")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}; move one of them")


def _check_options(reduction: str, softcap: float | None, z_loss: float, chunk: int | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown ({', '.join(REDUCTIONS)})")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap} must be positive, or None for no cap")
    if not z_loss >= 0:
        raise ValueError(f"z_loss {z_loss} must be zero or positive")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least one row, or None")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of the logits hidden weight^T, which never exist at once: cross_entropy(linear(hidden, weight)).

    loss_t = logsumexp(l_t) - l_t[targets_t] + z_loss logsumexp(l_t)^2, with l_t = softcap tanh(hidden_t weight^T /
    softcap), or without the cap. Rows whose target is ignore_index are left out before anything is multiplied; they
    cost nothing and get a gradient of zero. Products accumulate in float32; softmax and loss are float32.
    The z-loss is that of Chowdhery et al., PaLM, 2022, section 5; the fusion follows Wijmans et al., Cut Your Losses in
    Large-Vocabulary Language Models, 2024, but keeps the logits of a chunk instead of making them twice.

    Args:
        hidden: [..., H], float32, bfloat16 or float16. Any strides; a non-contiguous one is copied first.
        weight: [V, H], dtype and device of hidden. Under torch.autocast both are cast to its dtype first, as in
            torch.nn.functional.linear; the gradients come back in the dtypes given. Without a gradient (a frozen head)
            nothing is spent on it; the same holds for hidden.
        targets: [...], int32 or int64, each in [0, V) or ignore_index. Another value raises on CPU; on CUDA, where a
            check would stop the host, it counts as a row without a target logit (loss logsumexp, gradient softmax),
            and memory is never read out of bounds. `dreamkernels.ops.debug.debug_checks()` raises everywhere.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" (a loss of zero where ignored).
            Without any target the mean is 0 with gradients of zero, where torch returns NaN: a batch without text
            (images only) then adds nothing to a step instead of ending the run.
        softcap: bound of the logits, or None.
        z_loss: weight of the squared logsumexp; keeps the logits from drifting.
        chunk: rows whose logits exist at a time. None: as many as fit into 64 MiB on CPU and 256 MiB on CUDA. Smaller
            saves memory and multiplies less efficiently. With three chunks or more a needed weight gradient in bfloat16
            has float32 sums beside it: V x H x 2 bytes on CPU, V x H x 4 on CUDA (there from two chunks on).
        implementation: "auto" (CPU: C++, CUDA: Triton), or one of "cpu", "triton", "reference".

    Returns:
        float32: a scalar, or [...] for reduction="none". Differentiable once with respect to hidden and weight. No
        host synchronisation on CUDA. Gradients repeat bit for bit (on CPU as far as torch.mm does, for a given number
        of threads).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or the implementation cannot run on the device; with
            debug checks also a target out of range.
        RuntimeError: a target is out of range (CPU); it is named with its position.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check_tensors(hidden, weight, targets)
    _check_options(reduction, softcap, z_loss, chunk)
    if debug_enabled():
        check_range("linear_cross_entropy", "targets", targets, 0, weight.shape[0], also=ignore_index)
    chosen = choose(LINEAR_CROSS_ENTROPY.name, implementation, device_type)
    if chosen == "reference":
        with torch.autocast(device_type, enabled=False):
            return reference.linear_cross_entropy(hidden, weight, targets, ignore_index, reduction, softcap, z_loss)
    recording = torch.is_grad_enabled()
    hidden_grad, weight_grad = recording and hidden.requires_grad, recording and weight.requires_grad
    early = reduction != "none" and hidden.dtype != torch.float16
    loss, _, _ = overload_for(LINEAR_CROSS_ENTROPY, chosen, hidden_grad or weight_grad)(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets if targets.dim() == 1 else targets.reshape(-1),
        ignore_index,
        REDUCTIONS[reduction],
        softcap or 0.0,
        z_loss,
        chunk or 0,
        early and hidden_grad,
        early and weight_grad,
    )
    return loss.view(targets.shape) if reduction == "none" and targets.dim() != 1 else loss
