"""The paper's hours beside a plan: what the original's way of doing the same documents adds to the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dreamllm.planning.batches import Filling, Load, draw_batches
from dreamllm.planning.estimate import model_of
from dreamllm.profiling.workload import Precision, Recording

PAPER_MICRO_BATCH = 8
"""Documents per GPU in the paper."""


@dataclass(frozen=True)
class OriginalWork:
    """Floating-point operations of one document on average, the plan's way and the original's.

    `padding`: positions of a batch padded to its longest document, over those of its documents.
    """

    planned: float
    original: float
    padding: float

    @property
    def factor(self) -> float:
        return self.original / self.planned


@cache
def padding(stage: str, size: str, micro_batch: int = PAPER_MICRO_BATCH) -> float:
    """Over batches as the original makes them: rows of the longest document's length."""
    groups = draw_batches(stage, size, Filling(micro_batch)).groups
    padded = sum(len(group) * max(map(len, group)) for group in groups)
    return padded / sum(len(document) for group in groups for document in group)


def original_work(
    stage: str, size: str, precision: Precision, recording: Recording, load: Load, positions: float | None = None
) -> OriginalWork:
    """Of the documents of `load`, which `recording` is the step of. `positions` of the padded batch: by default as many
    as on average over the paper's batches.

    The original pads, checkpoints every decoder layer (a third forward pass over it), and computes all positions'
    logits (spec D.2, H). Attention is counted as recorded, because the original's takes the padding out; CLIP, UNet and
    VAE as well, because they do the same.
    """
    model = model_of(stage, size, precision)
    layers = list(model.decoder.get_submodule("layers").parameters())
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    trained = any(p.requires_grad for p in layers)
    longer = padding(stage, size) if positions is None else positions / load.tokens
    # A product with a weight takes two operations per element and position; so does each gradient.
    passes = 2 + (2 if trained else 1)  # forward, again, with respect to the input, to the weight
    products = 2 * passes * sum(p.numel() for p in layers)
    logits = 2 * (3 if model.get_output_embeddings().weight.requires_grad else 2) * head
    kept = sum(
        operator.flops * operator.calls
        for operator in recording.operators
        if operator.part not in ("LLM", "loss") or operator.kind == "attention"
    )
    language = (products + logits) * longer * load.tokens
    return OriginalWork(recording.flops / load.documents, (language + kept) / load.documents, longer)
