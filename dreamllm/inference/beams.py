"""Beam search of one prompt: which continuations of which beams live on, and when nothing better can come.

The rules are those of transformers' `generate(num_beams=...)`, whose results captioning protocols report: of 2 k
candidates per step k go on; a candidate that ends counts only among the best k; finished ones are ranked by the
logarithm of their probability over length ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EarlyStopping = bool | Literal["never"]
IMPOSSIBLE = -1e9


@dataclass(frozen=True)
class Beam:
    """A finished continuation and its score: the logarithm of its probability over its length ** length_penalty."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """The search after one prompt.

    Args:
        num_beams: beams that live at the same time.
        eos: the token that ends a beam.
        max_new_tokens: at most so many tokens, `eos` included.
        length_penalty: exponent of the length that scores are divided by; above 0 long answers gain.
        early_stopping: True ends as soon as there are `num_beams` finished beams; False when the best living beam,
            judged at its present length, cannot reach the worst finished one; "never" judges it at the length that is
            best for it.
        ends: tells whether further tokens (a stop string) end a beam, from all tokens of it.
    """

    def __init__(
        self,
        num_beams: int,
        eos: int,
        max_new_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        ends: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self.num_beams = num_beams
        self.beams: list[tuple[int, ...]] = [()] * num_beams
        self.done = False
        self._eos, self._most, self._ends = eos, max_new_tokens, ends
        self._penalty, self._early = length_penalty, early_stopping
        # All beams begin alike; only the first may continue, or they would stay alike.
        self._scores = torch.full((num_beams,), IMPOSSIBLE)
        self._scores[0] = 0.0
        self._finished: list[Beam | None] = [None] * num_beams
        self._finished_scores = torch.full((num_beams,), IMPOSSIBLE)

    @property
    def length(self) -> int:
        """Tokens of every living beam."""
        return len(self.beams[0])

    @property
    def best(self) -> Beam:
        """The finished beam with the highest score. Only after the search is done."""
        found = self._finished[0]
        assert found is not None
        return found

    def advance(self, log_probabilities: Tensor) -> list[int]:
        """Takes the next token's log-probabilities, float32 [num_beams or 1, V], and continues the beams.

        Returns for each new beam the number of the beam that it continues; `beams` are the new ones.
        """
        totals = log_probabilities + self._scores.to(log_probabilities.device)[:, None]
        vocabulary = totals.shape[1]
        best, places = totals.flatten().topk(2 * self.num_beams)
        scores, found = best.cpu(), places.tolist()
        parents, tokens = [place // vocabulary for place in found], [place % vocabulary for place in found]
        candidates = [(*self.beams[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        ended = torch.tensor([self._is_ended(candidate) for candidate in candidates])
        self._finish(candidates, scores, ended)
        self._scores, chosen = (scores + ended * IMPOSSIBLE).topk(self.num_beams)
        self.beams = [candidates[i] for i in chosen.tolist()]
        self.done = bool(ended.all()) or not self._can_improve()
        return [parents[i] for i in chosen.tolist()]

    def _is_ended(self, candidate: tuple[int, ...]) -> bool:
        if candidate[-1] == self._eos or len(candidate) >= self._most:
            return True
        return self._ends is not None and self._ends(candidate)

    def _finish(self, candidates: Sequence[tuple[int, ...]], scores: Tensor, ended: Tensor) -> None:
        """Keeps the best of the finished beams and of the candidates that end among the first `num_beams`."""
        counts = ended.clone()
        counts[self.num_beams :] = False
        ranked = scores / (self.length + 1) ** self._penalty
        new = [
            Beam(tokens, score) if finished else None
            for tokens, score, finished in zip(candidates, ranked.tolist(), counts.tolist(), strict=True)
        ]
        pool = [*self._finished, *new]
        merged = torch.cat([self._finished_scores, ranked + ~counts * IMPOSSIBLE])
        self._finished_scores, kept = merged.topk(self.num_beams)
        self._finished = [pool[i] for i in kept.tolist()]

    def _can_improve(self) -> bool:
        """Whether a living beam may still become one of the best finished ones."""
        full = all(beam is not None for beam in self._finished)
        if full and self._early is True:
            return False
        length = self._most if self._early == "never" and self._penalty > 0.0 else self.length
        best = self._scores[0] / length**self._penalty
        return bool(best > (self._finished_scores.min() if full else IMPOSSIBLE))
