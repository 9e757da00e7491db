"""Packed sequences whose first positions are constants: computed once without autograd, then only read.

A decoder is causal: what no parameter in training has touched yet, such as the caption before trained queries, is the
same in the forward and gets no gradient in the backward pass. So it needs no activations, only its keys and values:

    prefix = ConstantPrefix(prefix_rows, rows, lengths, last_layer)
    with torch.no_grad():
        decoder(first positions, cu_seq_lens_* of these, constant_prefix=prefix)
    prefix.complete = True
    decoder(the others, cu_seq_lens_q of these, cu_seq_lens_k of both, constant_prefix=prefix)

`transformers_attention` understands the argument, in models with and without `optimize()`. The second call may be
checkpointed: it reads the prefix and changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ConstantPrefix"]


class ConstantPrefix:
    """Keys and values of the constant first positions of N packed sequences, of every layer.

    Args:
        prefix_rows: int64 [P], the place of each constant position among the keys of both, sequence after sequence.
        rows: int64 [R], the places of the positions that follow them. Both together are 0 .. P + R - 1.
        lengths: int32 [N], the constant positions of each sequence.
        last_layer: index of the decoder's last layer: of the constants, only its keys and values are needed.
    """

    def __init__(self, prefix_rows: Tensor, rows: Tensor, lengths: Tensor, last_layer: int) -> None:
        self.prefix_rows, self.rows, self.lengths = prefix_rows, rows, lengths
        self.last_layer = last_layer
        self.complete = False
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def ends_at(self, layer: int) -> bool:
        """Whether `layer` has nothing to compute but the constants' keys and values."""
        return not self.complete and layer == self.last_layer

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keeps the constants' keys and values [P, H, D] of `layer`. Raises ValueError when they have a gradient."""
        if key.requires_grad or value.requires_grad:
            raise ValueError("the positions of a constant prefix must be computed under torch.no_grad()")
        self._stored[layer] = self._placed(key), self._placed(value)

    def _placed(self, states: Tensor) -> Tensor:
        room = states.new_empty(len(self.prefix_rows) + len(self.rows), *states.shape[1:])
        return room.index_copy_(0, self.prefix_rows, states)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P + R, H, D] of both, from those [R, H, D] of the positions that follow."""
        keys, values = self._stored[layer]
        return torch.index_copy(keys, 0, self.rows, key), torch.index_copy(values, 0, self.rows, value)
