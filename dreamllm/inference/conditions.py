"""Conditions of pictures outside of a running answer: after prompts, and of the empty prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dreamkernels import GraphedCalls
from dreamkernels.integrations.decoding import CachedDecoder
from dreamkernels.integrations.paged_cache import CachedSequence
from dreamllm.documents import EncodedDocument, load_picture
from dreamllm.inference.prompts import Prompts
from dreamllm.model import DreamLLM

KEPT_NULL_CONDITIONS = 8


class Conditions:
    """Computes conditions with one model, and keeps those of the latest negative prompts."""

    def __init__(
        self,
        model: DreamLLM,
        prompts: Prompts,
        batch_size: int,
        pack_weights: bool,
        graphs: GraphedCalls | None = None,
    ) -> None:
        self._model, self._prompts = model, prompts
        self._batch_size, self._pack_weights, self._graphs = batch_size, pack_weights, graphs
        self._kept_nulls: dict[str, tuple[tuple, Tensor]] = {}  # by prompt: what it was computed from, condition

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """[M, Q, H] -> [M, Q, C]"""
        return self._model.project_condition(states)

    def null_states(self, negative_prompt: str = "") -> Tensor:
        """States at the dream queries after the negative or the empty prompt, [Q, H]."""
        return self.states([self._prompts.encode_null(negative_prompt)])[0]

    def null(self, negative_prompt: str = "") -> Tensor:
        """The condition [Q, C] of the empty or a negative prompt, kept until a parameter it depends on changes."""
        version = self._parameter_version()
        kept = self._kept_nulls.pop(negative_prompt, None)
        if kept is None or kept[0] != version:
            kept = version, self.project(self.null_states(negative_prompt))
        while len(self._kept_nulls) >= KEPT_NULL_CONDITIONS:
            self._kept_nulls.pop(next(iter(self._kept_nulls)))  # the one used longest ago
        self._kept_nulls[negative_prompt] = kept
        return kept[1]

    def _parameter_version(self) -> tuple:
        model = self._model
        parts = (model.language_model, model.condition_projector)
        parameters = [model.dream_queries, *(p for part in parts for p in part.parameters())]
        # PyTorch counts in-place changes; a replaced tensor has another address.
        return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)

    @torch.no_grad()
    def states(self, documents: Sequence[EncodedDocument]) -> Tensor:
        """States at dream queries after each document, [M, Q, H]."""
        with evaluating(self._model):
            return self._states(documents)

    def _states(self, documents: Sequence[EncodedDocument]) -> Tensor:
        decoder = decoder_of(self._model, self._pack_weights, self._graphs)
        dream = self._prompts.dream_piece()
        queries = torch.arange(-self._model.layout.num_dream_queries - 1, -1)
        states = []
        for start in range(0, len(documents), self._batch_size):
            batch = documents[start : start + self._batch_size]
            loaded = [(document, [load_picture(source) for source in document.images]) for document in batch]
            pieces = [torch.cat([piece, dream]) for piece in self._prompts.embed(loaded)]
            counts = [len(piece) for piece in pieces]
            wanted = torch.cat([end + queries for end in torch.tensor(counts).cumsum(0)]).to(self._model.device)
            cache = decoder.new_cache()
            sequences: list[CachedSequence] = [cache.new() for _ in pieces]
            found = decoder.advance(cache, sequences, counts, torch.cat(pieces), wanted)
            states.append(found.unflatten(0, (len(pieces), -1)))
        return torch.cat(states)


def decoder_of(model: DreamLLM, pack_weights: bool, graphs: GraphedCalls | None = None) -> CachedDecoder:
    """The decoder of a model over the cache. Raises `ValueError` for a layout that it does not know."""
    return CachedDecoder.of(model.decoder, model.layout.max_length, pack_weights, model.get_output_embeddings(), graphs)


@contextmanager
def evaluating(model: DreamLLM) -> Iterator[None]:
    """In evaluation mode inside; every module as it was after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
