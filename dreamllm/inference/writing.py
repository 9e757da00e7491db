"""What every request writes next: tokens chosen from logits, beams continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dreamkernels.integrations.paged_cache import KeyValueCache
from dreamllm.documents import SPECIAL_TOKENS
from dreamllm.inference.request import Request
from dreamllm.inference.sampling import choose_token, most_likely, penalise
from dreamllm.model import DreamLLM, DreamLLMProcessor


class _Forbidden(NamedTuple):
    """Tokens that may not be chosen now: bool [vocabulary], and the same as float32 0 and -inf."""

    mask: Tensor
    bias: Tensor


class Writer:
    """Continues requests with tokens. `never`: bool [vocabulary], those that no request ever chooses."""

    def __init__(self, model: DreamLLM, never: Tensor) -> None:
        self._layout = model.layout
        self._never = never
        self._kept: dict[tuple, _Forbidden] = {}

    def write(self, cache: KeyValueCache, entries: Sequence[tuple[Request, int]], logits: Tensor) -> None:
        """Continues each request by its rows of logits [rows of all, vocabulary], given with their number: one per
        sequence of a request that writes, one after a prompt or a picture."""
        chosen = self._most_likely(entries, logits)
        start = 0
        for request, count in entries:
            token = chosen.get(start)
            rows = logits[start : start + count]
            start += count
            if token is not None:
                request.attempt(request.take, token)
            elif request.search is not None:
                request.attempt(self._search, cache, request, rows)
            else:
                request.attempt(self._continue, request, rows[0])

    def _most_likely(self, entries: Sequence[tuple[Request, int]], logits: Tensor) -> dict[int, int]:
        """By row of logits the next token of requests that take the most likely one: one search for all of them."""
        rows: dict[tuple[bool, bool], list[int]] = {}
        start = 0
        for request, count in entries:
            o = request.options
            if not (request.search or o.temperature or request.wants_picture) and o.repetition_penalty == 1.0:
                rows.setdefault((not request.may_draw, request.end_forbidden), []).append(start)
            start += count
        chosen: dict[int, int] = {}
        for key, group in rows.items():
            of_group = logits if len(group) == len(logits) else logits[group]
            chosen.update(zip(group, most_likely(of_group, self._forbidden(*key).bias), strict=True))
        return chosen

    def _continue(self, request: Request, logits: Tensor) -> None:
        draws, request.wants_picture = request.wants_picture and request.may_draw, False
        if draws:
            request.state = "dreaming"
            return
        o = request.options
        if o.repetition_penalty != 1.0:
            logits = penalise(logits, [*request.encoded.input_ids, *request.chosen], o.repetition_penalty)
        forbidden = self._forbidden(not request.may_draw, request.end_forbidden).mask
        request.take(choose_token(logits, forbidden, o.temperature, o.top_p, o.top_k, request.generator))

    def _search(self, cache: KeyValueCache, request: Request, logits: Tensor) -> None:
        search, penalty = request.search, request.options.repetition_penalty
        assert search is not None
        found = torch.log_softmax(logits.float(), dim=-1)
        if penalty != 1.0:
            seen = [[*request.encoded.input_ids, *beam] for beam in search.beams[: len(found)]]
            found = torch.stack([penalise(*row, penalty) for row in zip(found, seen, strict=True)])
        forbidden = self._forbidden(True, request.end_forbidden).mask
        parents = search.advance(found.masked_fill(forbidden, float("-inf")))
        request.state = "writing"
        if search.done:
            request.finish_search()
            return
        # From the prompt all beams continue one sequence.
        origins = request.sequences if len(request.sequences) > 1 else request.sequences * search.num_beams
        forks = [cache.fork(origins[parent]) for parent in parents]
        for sequence in request.sequences:
            cache.release(sequence)
        request.sequences = forks

    def _forbidden(self, dreams: bool, end: bool) -> _Forbidden:
        key = (dreams, end, self._never._version)
        if key not in self._kept:
            mask = self._never.clone()
            mask[self._layout.dream_start] |= dreams
            mask[self._layout.eos] |= end
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, float("-inf"))
            self._kept[key] = _Forbidden(mask, bias)
        return self._kept[key]


def never_chosen(model: DreamLLM, processor: DreamLLMProcessor) -> Tensor:
    """bool [vocabulary]: markers that only the program places, and ids the tokenizer does not know."""
    vocabulary = processor.tokenizer.get_vocab()
    markers = {vocabulary[token] for token in SPECIAL_TOKENS if token != "<dream_start>" and token in vocabulary}
    never = torch.ones(model.config.vocab_size, dtype=torch.bool)
    never[[i for i in vocabulary.values() if i < model.config.vocab_size]] = False
    never[[*markers, model.layout.pad]] = True
    return never.to(model.device)
