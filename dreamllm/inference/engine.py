"""The one text loop: prompt documents -> answer documents, pictures drawn where the model asks for them (spec F)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from dreamkernels.integrations.decoding import CachedDecoder
from dreamkernels.integrations.paged_cache import KeyValueCache
from dreamllm.documents import SPECIAL_TOKENS, Document, EncodedDocument, End, Part, Picture, Text, load_picture
from dreamllm.documents.batch import check_encoded
from dreamllm.inference.beams import BeamSearch
from dreamllm.inference.drawing import (
    DrawingOptions,
    Progress,
    check_seeds,
    drawing_defaults,
    picture_seed,
    to_pil,
)
from dreamllm.inference.options import Answer, GenerationOptions, Stopped
from dreamllm.inference.rows import Rows
from dreamllm.inference.sampler import draw
from dreamllm.inference.sampling import choose_token, penalise
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.model.slots import find_slots

KEPT_NULL_CONDITIONS = 8


@dataclass
class _Request:
    """One answer in the making.

    `length` counts positions; `last` is the state that the next token is chosen from; `latest` the last picture drawn.
    """

    options: GenerationOptions
    drawing: DrawingOptions
    seed: int
    prompt: Sequence[int]
    length: int
    last: Tensor
    generator: torch.Generator
    draws_now: bool
    parts: list[Part] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    num_drawn: int = 0
    latest: Image.Image | None = None
    stopped: Stopped | None = None


class Engine:
    """Answers prompts with one model. Requests given together share passes; no answer depends on the others.

    `batch_size`: prompts that advance together. More prompts are answered batch after batch. `pack_weights`: as in
    `CachedDecoder`. Raises `ValueError` for a language model that has not LLaMA's layout.
    """

    def __init__(
        self, model: DreamLLM, processor: DreamLLMProcessor, batch_size: int = 32, pack_weights: bool = True
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if model.layout != processor.layout:
            raise ValueError("the model and the processor have different sequence layouts; they do not belong together")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.layout = model.layout
        self._decoder = CachedDecoder.of(model.decoder, model.layout.max_length, pack_weights)
        self._cache: KeyValueCache | None = None
        self._never = _never_chosen(model, processor)
        self._kept_nulls: dict[str, tuple[tuple, Tensor]] = {}  # by prompt: what it was computed from, condition

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(
        self, prompt: Document, options: GenerationOptions | None = None, progress: Progress | None = None
    ) -> Answer:
        """Answers one prompt. See `answers`."""
        return self.answers([prompt], options, progress=progress)[0]

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[Document],
        options: GenerationOptions | None = None,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answers each prompt.

        `seeds`: one per prompt (default: options.seed, options.seed + 1, ...). `progress` is told of every denoising
        step of each round of drawing.

        Raises `ValueError` for an empty prompt, one longer than the context (by how much), one that leaves no room
        for an answer or a forced picture, and for a wrong number of seeds; `PictureError` for a picture in a prompt
        that cannot be read.
        """
        options = options or GenerationOptions()
        drawing = options.drawing or drawing_defaults(self.model)
        if drawing.candidates > 1 and not (options.pictures == "force" and options.max_new_tokens == 0):
            raise ValueError(
                f"{drawing.candidates} candidates per picture, but writing goes on after one picture only; "
                "use candidates=1, or pictures='force' with max_new_tokens=0"
            )
        seeds = range(options.seed, options.seed + len(prompts)) if seeds is None else seeds
        check_seeds(seeds, len(prompts), "prompt")
        encoded = [self._encode(prompt) for prompt in prompts]
        for document in encoded:
            self._check_room(document, options)
        answers: list[Answer] = []
        with _evaluating(self.model):
            for start in range(0, len(encoded), self.batch_size):
                rows = slice(start, start + self.batch_size)
                if options.num_beams > 1:
                    answers += self._search_batch(encoded[rows], options)
                else:
                    answers += self._answer_batch(encoded[rows], seeds[rows], options, drawing, progress)
        return answers

    @torch.no_grad()
    def conditions(self, prompts: Sequence[Document]) -> Tensor:
        """The UNet's conditions for drawing a picture right after each prompt, [M, Q, C]. Raises as `answers`."""
        encoded = [self._encode(prompt) for prompt in prompts]
        options = GenerationOptions(max_new_tokens=0, pictures="force")
        for document in encoded:
            self._check_room(document, options)
        with _evaluating(self.model):
            return self._project(self._dream_states(encoded))

    @torch.no_grad()
    def dream_states(self, prompts: Sequence[Document]) -> Tensor:
        """States at the dream queries after each prompt, [M, Q, H], before the condition projector."""
        with _evaluating(self.model):
            return self._dream_states([self._encode(prompt) for prompt in prompts])

    @torch.no_grad()
    def null_states(self, negative_prompt: str = "") -> Tensor:
        """States at the dream queries after the negative or the empty prompt, [Q, H]."""
        encoded = EncodedDocument(name="negative prompt" if negative_prompt else "empty prompt")
        encoded.append([self.layout.bos], learn=False)
        if negative_prompt:
            encoded.append(self.processor.encode_text(negative_prompt), learn=False)
        self._check_room(encoded, GenerationOptions(max_new_tokens=0, pictures="force"))
        with _evaluating(self.model):
            return self._dream_states([encoded])[0]

    def null_condition(self, negative_prompt: str = "") -> Tensor:
        """The condition [Q, C] that guidance leads away from, of the empty or a negative prompt.

        Those of the latest prompts are kept until a parameter they depend on changes.
        """
        version = self._parameter_version()
        kept = self._kept_nulls.pop(negative_prompt, None)
        if kept is None or kept[0] != version:
            kept = version, self._project(self.null_states(negative_prompt))
        while len(self._kept_nulls) >= KEPT_NULL_CONDITIONS:
            self._kept_nulls.pop(next(iter(self._kept_nulls)))  # the one used longest ago
        self._kept_nulls[negative_prompt] = kept
        return kept[1]

    def _parameter_version(self) -> tuple:
        model = self.model
        parts = (model.language_model, model.condition_projector)
        parameters = [model.dream_queries, *(p for part in parts for p in part.parameters())]
        # PyTorch counts in-place changes; a replaced tensor has another address.
        return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)

    @torch.no_grad()
    def _project(self, states: Tensor) -> Tensor:
        return self.model.project_condition(states)

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _encode(self, prompt: Document) -> EncodedDocument:
        texts = [part.text for part in prompt.parts if isinstance(part, Text)]
        if not prompt.pictures() and not any(text.strip() for text in texts):
            raise ValueError(f"{prompt.name or 'the prompt'} is empty; give it text or a picture")
        encoded = self.processor.encode(replace(prompt, overflow="error"))
        check_encoded(encoded, self.layout)
        return encoded

    def _check_room(self, encoded: EncodedDocument, options: GenerationOptions) -> None:
        needed = 1
        if options.pictures == "force":
            needed = self.layout.dream_length
            needed += self.layout.image_length + 1 if options.max_new_tokens else 0
        excess = len(encoded) + needed - self.layout.max_length
        if excess > 0:
            what = "a picture" if options.pictures == "force" else "an answer"
            raise ValueError(
                f"{encoded.name or 'the prompt'} of {len(encoded)} tokens leaves no room for {what}: shorten it by "
                f"{excess} (the context holds {self.layout.max_length} tokens)"
            )

    def _embed(self, documents: Sequence[EncodedDocument]) -> list[Tensor]:
        ids = torch.tensor([i for document in documents for i in document.input_ids], device=self.model.device)
        images = [load_picture(source) for document in documents for source in document.images]
        features = self._features(images) if images else None
        slots = find_slots(ids[None], self.layout, first_call=True)
        assert slots is not None
        embeds = self.model.embed(ids, slots.splice_index(len(images), queries=True), features)
        return list(embeds.split([len(document) for document in documents]))

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        return self.model.encode_images(self.processor.vision(images).to(self.model.device))

    def _rows(self, count: int) -> Rows:
        """Empty rows of the engine's cache, which is made when it is first needed, and again for another dtype."""
        if self._cache is None or not self._decoder.fits(self._cache):
            self._cache = self._decoder.new_cache()
        return Rows(self._decoder, self._cache, count)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _answer_batch(
        self,
        documents: Sequence[EncodedDocument],
        seeds: Sequence[int],
        options: GenerationOptions,
        drawing: DrawingOptions,
        progress: Progress | None,
    ) -> list[Answer]:
        with self._rows(len(documents)) as cache:
            return self._answer_rows(cache, documents, seeds, options, drawing, progress)

    def _answer_rows(
        self,
        cache: Rows,
        documents: Sequence[EncodedDocument],
        seeds: Sequence[int],
        options: GenerationOptions,
        drawing: DrawingOptions,
        progress: Progress | None,
    ) -> list[Answer]:
        states = cache.advance(self._embed(documents))
        forced = options.pictures == "force"
        requests = [
            _Request(
                options,
                drawing,
                seed,
                document.input_ids,
                len(document),
                state[-1],
                torch.Generator().manual_seed(seed),
                forced,
            )
            for document, seed, state in zip(documents, seeds, states, strict=True)
        ]
        active = list(requests)
        while active:
            # Who waits for a picture waits until everyone does, so that pictures are drawn together.
            if all(request.draws_now for request in active):
                active = self._draw_pictures(cache, active, progress)
            else:
                active = self._write_tokens(cache, active)
        return [self._finish(request) for request in requests]

    def _write_tokens(self, cache: Rows, active: list[_Request]) -> list[_Request]:
        """One token for every request that is writing."""
        writing = [request for request in active if not request.draws_now]
        logits = self.model.get_output_embeddings()(torch.stack([request.last for request in writing]))
        for request, row in zip(writing, logits, strict=True):
            self._take(request, self._choose(request, row))
        active = _unfinished(cache, active)
        fed = [request for request in active if not request.draws_now]
        if fed:
            table = self.model.get_input_embeddings()
            nothing = torch.zeros(0, dtype=torch.long, device=self.model.device)
            tokens = [nothing if request.draws_now else nothing.new_tensor(request.chosen[-1:]) for request in active]
            states = cache.advance([table(token) for token in tokens])
            for request, state in zip(active, states, strict=True):
                if not request.draws_now:
                    request.last = state[-1]
        return active

    def _choose(self, request: _Request, logits: Tensor) -> int:
        forbidden = self._never
        o = request.options
        too_early = len(request.chosen) < o.min_new_tokens
        if too_early or not self._may_draw(request):
            forbidden = forbidden.clone()
            forbidden[self.layout.dream_start] |= not self._may_draw(request)
            forbidden[self.layout.eos] |= too_early
        logits = penalise(logits, [*request.prompt, *request.chosen], o.repetition_penalty)
        return choose_token(logits, forbidden, o.temperature, o.top_p, o.top_k, request.generator)

    def _may_draw(self, request: _Request) -> bool:
        most = request.options.max_pictures
        fits = request.length + self.layout.dream_length + self.layout.image_length <= self.layout.max_length
        return fits and request.options.pictures != "forbid" and (most is None or request.num_drawn < most)

    def _take(self, request: _Request, token: int) -> None:
        request.chosen.append(token)
        if token == self.layout.dream_start:
            request.draws_now = True
            return
        request.length += 1
        if token == self.layout.eos:
            request.stopped = "end"
            return
        request.text_ids.append(token)
        request.stopped = self._limit(request)

    def _limit(self, request: _Request) -> Stopped | None:
        if len(request.chosen) >= request.options.max_new_tokens:
            return "length"
        return "context" if request.length >= self.layout.max_length else None

    def _draw_pictures(self, cache: Rows, active: list[_Request], progress: Progress | None) -> list[_Request]:
        """A picture for every request: queries on the cache, denoising, and the picture's features on the cache."""
        condition = self._project(self._dream(cache, len(active)))
        drawing = active[0].drawing
        seeds = [
            picture_seed(request.seed, request.num_drawn + candidate)
            for request in active
            for candidate in range(drawing.candidates)
        ]
        null = self.null_condition(drawing.negative_prompt) if drawing.guided else None
        drawn = draw(self.model, condition, null, drawing, seeds, progress=progress)
        for request, candidates in zip(active, drawn.split(drawing.candidates), strict=True):
            self._close_text(request)
            request.latest = to_pil(candidates[-1])
            request.parts += [Picture(to_pil(c), comprehension=True, creation=True) for c in candidates]
            request.num_drawn += drawing.candidates
            request.draws_now = False
            request.length += self.layout.dream_length + self.layout.image_length
            request.stopped = self._limit(request)
        active = _unfinished(cache, active)
        if active:
            states = cache.advance(self._picture_pieces([r.latest for r in active if r.latest is not None]))
            for request, state in zip(active, states, strict=True):
                request.last = state[-1]
        return active

    # -- beams ---------------------------------------------------------------------------------------------------------

    def _search_batch(self, documents: Sequence[EncodedDocument], options: GenerationOptions) -> list[Answer]:
        with self._rows(len(documents)) as cache:
            return self._search_rows(cache, documents, options)

    def _search_rows(
        self, cache: Rows, documents: Sequence[EncodedDocument], options: GenerationOptions
    ) -> list[Answer]:
        states = [state[-1:] for state in cache.advance(self._embed(documents))]
        rooms = [self.layout.max_length - len(document) for document in documents]
        searches = [
            BeamSearch(
                options.num_beams,
                self.layout.eos,
                min(options.max_new_tokens, room),
                options.length_penalty,
                options.early_stopping,
            )
            for room in rooms
        ]
        active = [(search, document) for search, document in zip(searches, documents, strict=True)]
        while active:
            logits = self.model.get_output_embeddings()(torch.cat(states)).float().split([len(s) for s in states])
            parents: list[int] = []  # rows of the cache that the new beams continue
            first, living = 0, []
            for (search, document), rows in zip(active, logits, strict=True):
                chosen = search.advance(self._log_probabilities(search, document, rows, options))
                if not search.done:
                    parents += [first + (beam if len(rows) > 1 else 0) for beam in chosen]
                    living.append((search, document))
                first += len(rows)
            active = living
            if active:
                cache.choose(parents)
                tokens = torch.tensor([b[-1] for search, _ in active for b in search.beams], device=self.model.device)
                new = cache.advance(list(self.model.get_input_embeddings()(tokens)[:, None]))
                states = list(torch.cat(new).split([search.num_beams for search, _ in active]))
        return [self._found(search, room) for search, room in zip(searches, rooms, strict=True)]

    def _log_probabilities(
        self, search: BeamSearch, document: EncodedDocument, logits: Tensor, options: GenerationOptions
    ) -> Tensor:
        forbidden = self._never.clone()
        forbidden[self.layout.dream_start] = True
        forbidden[self.layout.eos] |= search.length < options.min_new_tokens
        found = torch.log_softmax(logits, dim=-1)
        if options.repetition_penalty != 1.0:
            seen = [[*document.input_ids, *beam] for beam in search.beams[: len(found)]]
            found = torch.stack([penalise(*row, options.repetition_penalty) for row in zip(found, seen, strict=True)])
        return found.masked_fill(forbidden, float("-inf"))

    def _found(self, search: BeamSearch, room: int) -> Answer:
        tokens, ended = search.best.tokens, search.best.tokens[-1] == self.layout.eos
        text = self.processor.decode_text(list(tokens[:-1] if ended else tokens))
        parts: list[Part] = [Text(text)] if text else []
        stopped: Stopped = "end" if ended else "context" if len(tokens) == room else "length"
        return Answer(
            Document((*parts, End()) if ended else tuple(parts), "error", "answer"), tokens, stopped, search.best.score
        )

    def _dream_states(self, documents: Sequence[EncodedDocument]) -> Tensor:
        states = []
        for start in range(0, len(documents), self.batch_size):
            batch = documents[start : start + self.batch_size]
            with self._rows(len(batch)) as cache:
                cache.advance(self._embed(batch))
                states.append(self._dream(cache, len(batch)))
        return torch.cat(states)

    def _dream(self, cache: Rows, count: int) -> Tensor:
        """`<dream_start>`, the queries and `<dream_end>` in one pass; the states at the queries, [B, Q, H]."""
        ids = torch.tensor(self.layout.dream_ids(), device=self.model.device)
        index = torch.full_like(ids, -1)
        index[1:-1] = torch.arange(self.layout.num_dream_queries, device=self.model.device)
        piece = self.model.embed(ids, index, None)
        return torch.stack(cache.advance([piece] * count))[:, 1:-1]

    def _picture_pieces(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        ids = torch.tensor([self.layout.im_start, self.layout.im_end], device=self.model.device)
        start, end = self.model.get_input_embeddings()(ids).split(1)
        features = self._features([load_picture(picture) for picture in pictures])
        return [torch.cat([start, f.to(start.dtype), end]) for f in features]

    def _close_text(self, request: _Request) -> None:
        text = self.processor.decode_text(request.text_ids)
        request.text_ids = []
        if text:
            request.parts.append(Text(text))

    def _finish(self, request: _Request) -> Answer:
        self._close_text(request)
        assert request.stopped is not None
        if request.stopped == "end":
            request.parts.append(End())
        return Answer(Document(tuple(request.parts), "error", "answer"), tuple(request.chosen), request.stopped)


def _unfinished(cache: Rows, active: list[_Request]) -> list[_Request]:
    rows = [row for row, request in enumerate(active) if request.stopped is None]
    if rows and len(rows) < len(active):
        cache.choose(rows)
    return [active[row] for row in rows]


def _never_chosen(model: DreamLLM, processor: DreamLLMProcessor) -> Tensor:
    """bool [vocabulary]: markers that only the program places, and ids the tokenizer does not know."""
    vocabulary = processor.tokenizer.get_vocab()
    markers = {vocabulary[token] for token in SPECIAL_TOKENS if token != "<dream_start>" and token in vocabulary}
    never = torch.ones(model.config.vocab_size, dtype=torch.bool)
    never[[i for i in vocabulary.values() if i < model.config.vocab_size]] = False
    never[[*markers, model.layout.pad]] = True
    return never.to(model.device)


@contextmanager
def _evaluating(model: DreamLLM) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
