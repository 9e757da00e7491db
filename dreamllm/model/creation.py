"""The language model's part of a creation step when it is frozen: only the dream queries need autograd.

A document that is drawn from is `caption, dream queries, end`. When neither the decoder nor anything before the queries
is trained, and the language loss does not count, then

- the positions before the first query are constants: they run without autograd and leave keys and values behind;
- the positions from the first to the last query run with autograd against these;
- the positions behind the last query, documents without queries, and the head reach no loss: they do not run.

Losses and gradients are those of the plain way, up to rounding. Tensor name suffixes as in `modeling.py`; P constant
positions, R positions from the first to the last query of their document, S sequences with queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dreamkernels.integrations.transformers_attention import ConstantPrefix
from dreamllm.documents.batch import PackedBatch
from dreamllm.model.attention import ATTENTION_NAME

if TYPE_CHECKING:
    from dreamllm.model.modeling import DreamLLM


def why_not_split(model: DreamLLM, batch: PackedBatch) -> str:
    """Why a batch cannot take the way of this module, or "". Read from the host's knowledge only."""
    if not model.splits_creation:
        return "the language model is spread over processes, which must all run it equally often"
    if model.config.loss_weight_lm:
        return f"the language loss counts (loss_weight_lm is {model.config.loss_weight_lm:g})"
    if not model.packs_attention:
        return f"the attention is {model.language_model.config._attn_implementation}, not {ATTENTION_NAME}"
    if not batch.query_spans:
        return "the batch has no dream queries"
    if all(start == first for start, first, _ in batch.query_spans):
        return "nothing stands before the dream queries"
    apart = set() if model.config.tie_word_embeddings else {id(p) for p in model.get_output_embeddings().parameters()}
    if any(p.requires_grad and id(p) not in apart for p in model.language_model.parameters()):
        return "parameters of the language model are trained"
    readers = (("visual projector", model.visual_projector), ("vision model", model.vision_model))
    for name, module in readers:
        if batch.pixel_values is not None and any(p.requires_grad for p in module.parameters()):
            return f"the batch has input pictures and the {name} is trained"
    return ""


class Packing(Protocol):
    """Lengths of packed sequences."""

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [S + 1], cumulative."""

    @property
    def max_seqlen(self) -> int:
        """Of the longest."""


@dataclass(frozen=True)
class Positions:
    """Some positions of a pack as a pack of their own: where they stand, [N], and their sequences' lengths."""

    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass(frozen=True)
class CreationSplit:
    """The two packs of a batch. `row_of`: int64 [T], the row in `dependent` of each position that is one."""

    constant: Positions
    dependent: Positions
    both: Positions
    prefix_rows: Tensor
    rows: Tensor
    lengths: Tensor
    row_of: Tensor

    @staticmethod
    def of(batch: PackedBatch) -> CreationSplit:
        """Computed on the host from `batch.query_spans`, without a host synchronisation."""
        starts, firsts, ends = np.array(batch.query_spans, dtype=np.int64).T
        constant, dependent, both = _ranges(starts, firsts), _ranges(firsts, ends), _ranges(starts, ends)
        row_of_key = np.zeros(batch.num_tokens, dtype=np.int64)
        row_of_key[both] = np.arange(both.size)
        row_of = np.zeros(batch.num_tokens, dtype=np.int64)
        row_of[dependent] = np.arange(dependent.size)
        lengths = [firsts - starts, ends - firsts, ends - starts]
        device = batch.input_ids.device
        long = _to_device([constant, dependent, both, row_of_key[constant], row_of_key[dependent], row_of], device)
        cu = [np.concatenate([[0], np.cumsum(each)]) for each in lengths]
        short = _to_device([*cu, lengths[0]], device, np.int32)
        packs = [Positions(long[i], short[i], int(lengths[i].max())) for i in range(3)]
        return CreationSplit(packs[0], packs[1], packs[2], long[3], long[4], short[3], long[5])


def _ranges(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """begin, begin + 1, ..., end - 1 of each pair, end to end."""
    return np.concatenate([np.arange(b, e) for b, e in zip(begins, ends, strict=True)])


def _to_device(arrays: list[np.ndarray], device: torch.device, dtype: Any = np.int64) -> list[Tensor]:
    """In one copy, from pinned memory where that keeps the host from waiting."""
    together = torch.from_numpy(np.concatenate(arrays).astype(dtype))
    if device.type == "cuda":
        together = together.pin_memory()
    return list(together.to(device, non_blocking=True).split([array.size for array in arrays]))


def dependent_states(model: DreamLLM, batch: PackedBatch, split: CreationSplit, rows: Tensor | None = None) -> Tensor:
    """Final states [R, H] of the positions from the first to the last query of their document, or those of `rows`."""
    features = None if batch.pixel_values is None else model.encode_images(batch.pixel_values)
    last_layer = model.config.text_config.num_hidden_layers - 1
    prefix = ConstantPrefix(split.prefix_rows, split.rows, split.lengths, last_layer)

    def run(queries: Positions, keys: Positions, rows: Tensor | None = None) -> Tensor:
        at = queries.positions
        embeds = model.embed(batch.input_ids[at], batch.splice_index[at], features)
        return model.decode_packed(embeds, batch.position_ids[at], queries, keys, rows, constant_prefix=prefix)

    with torch.no_grad():
        run(split.constant, split.constant)
    prefix.complete = True
    return run(split.dependent, split.both, rows)
