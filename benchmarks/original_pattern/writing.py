"""Text generation by transformers' `generate`, as the original evaluates (spec F.1, G.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.original_pattern.model import OriginalPattern


@torch.no_grad()
def write(
    model: OriginalPattern,
    input_ids: Tensor,
    attention_mask: Tensor,
    images: Tensor,
    new_tokens: int,
    num_beams: int = 1,
    never: Sequence[int] = (),
) -> Tensor:
    """Exactly `new_tokens` tokens after prompts [B, P] with pictures [N, 3, h, w]; int64 [B, new_tokens].

    `never`: ids that are not chosen.
    """
    ids = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        images=images,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_beams=num_beams,
        do_sample=False,
        suppress_tokens=list(never) or None,
        pad_token_id=model.layout.pad,
        eos_token_id=model.layout.eos,
    )
    return ids[:, input_ids.shape[1] :]
