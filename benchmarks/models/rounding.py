"""How far two programs in bfloat16 may differ: as far as rounding takes the original's pattern from itself in float32.

Everything is measured on the case's own documents and weights, which float32 holds exactly; no constant is chosen
besides the house's rule that an operator of ours may be off by twice the error of plain PyTorch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.models.setting import Setting, in_float32
from benchmarks.original_pattern import OriginalPattern, PaddedBatch, Trainer

OURS_BEYOND_PLAIN = 2.0  # the house's rule


def loss_tolerances(trainer: Trainer, documents: Sequence[PaddedBatch], setting: Setting) -> tuple[float, ...]:
    """Of language loss, diffusion loss, total and gradient norm of a step on `documents`, each relative.

    Let r be the root mean square of the pattern's errors on each document alone, relative to the values' mean. A step's
    values are means over n documents. Independent errors leave r / sqrt(n) of a mean, and sqrt(2 / n) r between two
    programs: 2 r is four standard deviations at n = 8. Errors that are all alike leave r in each program: 2 r lies
    between them. Documents without a loss, whose value is zero, say nothing. The norm is a number of the dtype itself,
    which each program rounds at the end, by half an epsilon at most.
    """

    def values() -> Tensor:
        found = []
        for document in documents:
            found.append(trainer.gradients(document, setting.generator()))
            trainer.optimizer.zero_grad()
        return torch.tensor(found, dtype=torch.float64)

    rough = values()
    with in_float32(trainer.model):
        exact = values()
    tolerances = []
    for mine, true in zip(rough.unbind(1), exact.unbind(1), strict=True):
        said = true != 0
        r = (mine - true)[said].square().mean().sqrt() / true[said].mean() if said.any() else torch.zeros(())
        tolerances.append(2 * r.item())
    tolerances[-1] += torch.finfo(setting.dtype).eps
    return tuple(tolerances)


def picture_tolerance(draw: Callable[[], Sequence[Tensor]], model: torch.nn.Module, least: float) -> float:
    """Of pictures in [0, 1]: the largest error of `draw`, which runs `model`, and twice as much for ours."""
    rough = draw()
    with in_float32(model):
        exact = draw()
    error = max((a - b).abs().max().item() for a, b in zip(rough, exact, strict=True))
    return max(least, (1 + OURS_BEYOND_PLAIN) * error)


@torch.no_grad()
def poor_choice(pattern: OriginalPattern, inputs: Sequence[Tensor], tokens: Tensor, never: Sequence[int]) -> str:
    """What is wrong with greedily chosen `tokens` [K] after a prompt (ids, mask [1, P] and pixels); "" if nothing.

    Two programs in bfloat16 choose other tokens as soon as two are about as likely. But no token may lie further below
    the likeliest one, by the logits that float32 gives for the same text, than the errors of both their logits.
    """
    ids, mask, images = inputs
    tokens = tokens.to(ids.device)
    text = torch.cat([ids, tokens[None, :-1]], dim=1)
    seen = torch.cat([mask, mask.new_ones(1, len(tokens) - 1)], dim=1)

    def logits() -> Tensor:
        found = pattern(text, seen, images=images, use_cache=False).logits[0, ids.shape[1] - 1 :]
        found[:, list(never)] = 0.0  # of no interest, and no error
        return found

    rough = logits()
    with in_float32(pattern):
        exact = logits()
    error = (rough - exact).abs().max().item()
    exact[:, list(never)] = -torch.inf
    below = (exact.max(dim=1).values - exact.gather(1, tokens[:, None])[:, 0]).max().item()
    allowed = 2 * OURS_BEYOND_PLAIN * error
    if below <= allowed:
        return ""
    return f"a chosen token lies {below:.2e} below the likeliest one, but rounding explains {allowed:.2e} only"
