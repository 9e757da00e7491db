"""The one loop: prompt documents -> answer documents, pictures drawn where the model asks for them (spec F)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from dreamkernels import GraphedCalls
from dreamkernels.integrations.paged_cache import PAGE_SIZE, KeyValueCache
from dreamllm.documents import Document, load_picture
from dreamllm.inference.conditions import Conditions, decoder_of, evaluating
from dreamllm.inference.drawing import Progress, check_seeds
from dreamllm.inference.intake import Intake, options_of
from dreamllm.inference.options import Answer, GenerationOptions
from dreamllm.inference.picture_work import PictureWork
from dreamllm.inference.prompts import Prompts
from dreamllm.inference.request import Event, OnEvent, Request
from dreamllm.inference.writing import Writer, never_chosen
from dreamllm.model import DreamLLM, DreamLLMProcessor


class Engine:
    """Answers prompts with one model. Requests share passes and pictures are denoised together; no answer depends on
    the others.

    `answers` and `answer` give answers, `stream` gives one piece by piece. Underneath, requests that are given to
    `submit` advance by `step`: each step appends to the cache whatever every request has next (a prompt, a token, the
    dream queries, a created picture), chooses tokens, and takes one denoising step of the pictures in work, which
    begin beside others that are further on. Requests join and leave between steps. Engines are not for several threads
    at a time.

    Args:
        model, processor: as `DreamLLM.from_pretrained` and `DreamLLMProcessor.from_pretrained` load them.
        batch_size: requests that advance together; further ones wait for a place.
        pack_weights: as in `dreamkernels.integrations.decoding.CachedDecoder`.
        max_cache_tokens: positions that the key-value cache holds at most; requests wait while there is no room for
            the longest they may become. None: as many as `batch_size` requests need.
        max_step_tokens: positions of prompts and pictures that are appended in one step, unless one alone has more.
        cuda_graphs: launch a step of writing and a call of the UNet as one CUDA graph each; None: where the model is
            on CUDA. Not for a model whose modules compute something else from call to call.

    Raises `ValueError` for numbers below 1, a processor of another model, and a language model that has not LLaMA's
    layout.
    """

    def __init__(
        self,
        model: DreamLLM,
        processor: DreamLLMProcessor,
        batch_size: int = 32,
        pack_weights: bool = True,
        max_cache_tokens: int | None = None,
        max_step_tokens: int = 8192,
        cuda_graphs: bool | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_step_tokens", max_step_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if max_cache_tokens is not None and max_cache_tokens < 1:
            raise ValueError(f"max_cache_tokens must be at least 1, not {max_cache_tokens}")
        if model.layout != processor.layout:
            raise ValueError("the model and the processor have different sequence layouts; they do not belong together")
        if cuda_graphs and model.device.type != "cuda":
            raise ValueError(f"cuda_graphs need a model on cuda, not on {model.device}; leave them out")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.layout = model.layout
        self._pack_weights = pack_weights
        self._max_cache_tokens, self._max_step_tokens = max_cache_tokens, max_step_tokens
        graphed = model.device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self._writing_graphs = GraphedCalls() if graphed else None
        self._decoder = decoder_of(model, pack_weights, self._writing_graphs)
        self._cache: KeyValueCache | None = None
        self._never = never_chosen(model, processor)
        self._writer = Writer(model, self._never)
        self._prompts = Prompts(model, processor)
        self._conditions = Conditions(model, self._prompts, batch_size, pack_weights, self._writing_graphs)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._pictures = PictureWork(model, self.null_condition, GraphedCalls() if graphed else None)
        self._intake = Intake(processor, self._prompts, self._pictures, model, max_cache_tokens)

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(
        self, prompt: Document, options: GenerationOptions | None = None, progress: Progress | None = None
    ) -> Answer:
        """Answers one prompt. See `answers`."""
        return self.answers([prompt], options, progress=progress)[0]

    def answers(
        self,
        prompts: Sequence[Document],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answers each prompt, with the same options or with its own.

        `seeds`: one per prompt (default: options.seed, options.seed + 1, ...; with options for each prompt their own).
        `progress` is told of denoising steps: how many all pictures in work have done, and of how many.

        Raises `ValueError` for an empty prompt, one longer than the context (by how much), one that leaves no room
        for an answer or a forced picture, and for a wrong number of seeds or options; `PictureError` for a picture in
        a prompt that cannot be read.
        """
        every, seeds = options_of(prompts, options, seeds)
        requests = [
            self._intake.request(prompt, own, seed, progress=progress)
            for prompt, own, seed in zip(prompts, every, seeds, strict=True)
        ]
        self._waiting.extend(requests)
        with evaluating(self.model):
            try:
                while not all(request.done for request in requests):
                    self.step()
                    if failed := next((request for request in requests if request.error is not None), None):
                        raise failed.error or AssertionError
            finally:
                for request in requests:
                    if not request.done:
                        request.cancel()
                self._remove_cancelled()
        return [request.answer for request in requests]

    def stream(
        self, prompt: Document, options: GenerationOptions | None = None, preview_every: int = 0
    ) -> Iterator[Event | Answer]:
        """Answers one prompt piece by piece: `NewText`, `Preview` and `NewPicture` as they come, then the `Answer`.

        `preview_every`: a `Preview` of each picture after every so many denoising steps; 0: none. Each is decoded,
        which costs time. Leaving the iterator ends the work. Raises as `answers`.
        """
        events: deque[Event] = deque()
        request = self.submit(prompt, options, on_event=events.append, preview_every=preview_every)
        try:
            while not request.done:
                self.step()
                while events:
                    yield events.popleft()
            yield request.answer
        finally:
            if not request.done:
                request.cancel()
                self._remove_cancelled()

    # -- step by step --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Document,
        options: GenerationOptions | None = None,
        seed: int | None = None,
        on_event: OnEvent | None = None,
        preview_every: int = 0,
    ) -> Request:
        """Gives the engine a request, which `step` advances until it is done. Raises as `answers`.

        `on_event` is called from within `step` with each event; what it raises ends this request only.
        """
        if preview_every < 0:
            raise ValueError(f"preview_every must be at least 0, not {preview_every}")
        options = options or GenerationOptions()
        seed = options.seed if seed is None else seed
        check_seeds([seed], 1, "prompt")
        request = self._intake.request(prompt, options, seed, on_event, preview_every)
        self._waiting.append(request)
        return request

    @property
    def num_running(self) -> int:
        """Requests that advance with every step."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def step(self) -> bool:
        """Advances every request by one step. Returns whether anything is left to do.

        An error that concerns one request ends that one; one that concerns a pass ends all that took part, and is
        raised.
        """
        if self.model.training:
            with evaluating(self.model):
                return self.step()
        self._remove_cancelled()
        try:
            with torch.no_grad():
                self._admit()
                self._append()
                self._pictures.advance(self._running)
        except BaseException as error:
            for request in self._running:
                if not request.done:
                    request.fail(error)
            self._pictures.forget()
            raise
        finally:
            self._remove_done()
        return bool(self._running or self._waiting)

    def _remove_cancelled(self) -> None:
        for request in (*self._waiting, *self._running):
            if request.cancelled and not request.done:
                request.state = "done"
        self._waiting = deque(request for request in self._waiting if not request.done)
        self._pictures.remove_done()
        self._remove_done()

    def _remove_done(self) -> None:
        for request in self._running:
            if request.done:
                self._release(request)
        self._running = [request for request in self._running if not request.done]

    def _release(self, request: Request) -> None:
        for sequence in request.sequences:
            self._kv.release(sequence)
        request.sequences = []

    @property
    def _kv(self) -> KeyValueCache:
        assert self._cache is not None
        return self._cache

    # -- who takes part ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Lets waiting requests in, in their order."""
        if not self._waiting:
            return
        if not self._running:
            self._decoder = decoder_of(self.model, self._pack_weights, self._writing_graphs)
            if self._cache is None or not self._decoder.fits(self._cache):
                most = self._max_cache_tokens
                self._cache = self._decoder.new_cache(None if most is None else max(1, most // PAGE_SIZE))
        while self._waiting and len(self._running) < self.batch_size:
            if self._max_cache_tokens is not None:
                taken = sum(self._intake.most_tokens(request) for request in (*self._running, self._waiting[0]))
                if taken > self._max_cache_tokens:
                    return
            request = self._waiting.popleft()
            request.sequences = [self._kv.new()]
            request.state = "prompt"
            self._running.append(request)

    # -- the pass through the language model ---------------------------------------------------------------------------

    def _append(self) -> None:
        """Appends to the cache what every request has next, then chooses tokens."""
        writing = [request for request in self._running if request.state == "writing"]
        pieces = self._pieces()
        entries = [(request, sequence) for request in writing for sequence in request.sequences]
        counts = [1] * len(entries) + [len(piece) for _, piece in pieces]
        if not counts:
            return
        embeds = [piece for _, piece in pieces]
        if entries:
            tokens = [token for request in writing for token in request.next_tokens]
            embeds.insert(0, self.model.get_input_embeddings()(torch.tensor(tokens, device=self.model.device)))
        # Of a piece that ends with the dream queries the states there are wanted, of all others the last one.
        asking = [request for request, _ in pieces if request.next_is_picture]
        reading = [request for request, _ in pieces if not request.next_is_picture]
        wanted = self._wanted(len(entries), pieces) if pieces else None
        sequences = [sequence for _, sequence in entries] + [request.sequences[0] for request, _ in pieces]
        states = self._decoder.advance(self._kv, sequences, counts, torch.cat(embeds), wanted)
        rows = len(entries) + len(reading)
        if asking:
            self._begin_pictures(asking, states[rows:].unflatten(0, (len(asking), -1)))
        if rows:
            continued = [(r, len(r.sequences)) for r in writing] + [(r, 1) for r in reading]
            self._writer.write(self._kv, continued, self._decoder.logits(states[:rows]))

    def _wanted(self, singles: int, pieces: Sequence[tuple[Request, Tensor]]) -> Tensor:
        """Positions of the pass whose states are wanted: first those that tokens are chosen by, then the queries."""
        last, end = list(range(singles)), singles
        queries: list[int] = []
        for request, piece in pieces:
            end += len(piece)
            if request.next_is_picture:
                queries += range(end - self.layout.num_dream_queries - 1, end - 1)
            else:
                last.append(end - 1)
        return torch.tensor(last + queries, device=self.model.device)

    def _pieces(self) -> list[tuple[Request, Tensor]]:
        """Embeddings of the prompts, dream queries and created pictures that are next."""
        waiting = [request for request in self._running if request.state in ("prompt", "dreaming", "reading")]
        due: list[Request] = []
        total = 0
        for request in waiting:
            size = {"dreaming": self.layout.dream_length, "reading": self.layout.image_length}.get(
                request.state, len(request.encoded) + request.next_is_picture * self.layout.dream_length
            )
            total += size
            if due and total > self._max_step_tokens:
                break
            due.append(request)
        prompts = self._load_prompts([request for request in due if request.state == "prompt"])
        dream = self._prompts.dream_piece() if any(request.next_is_picture for request in due) else None
        embedded = iter(self._prompts.embed([(r.encoded, pictures) for r, pictures in prompts]))
        found = [(r, next(embedded)) for r, _ in prompts]
        if dream is not None:
            found = [(r, torch.cat([piece, dream]) if r.next_is_picture else piece) for r, piece in found]
            found += [(r, dream) for r in due if r.state == "dreaming"]
        reading = [request for request in due if request.state == "reading"]
        if reading:
            pictures = [request.candidates[-1] for request in reading]
            found += zip(reading, self._prompts.picture_pieces([p for p in pictures if p is not None]), strict=True)
        return found

    def _load_prompts(self, requests: Sequence[Request]) -> list[tuple[Request, list[Image.Image]]]:
        """The pictures of each prompt. A request whose pictures cannot be read fails alone."""
        loaded: list[tuple[Request, list[Image.Image]]] = []

        def load(request: Request) -> None:
            loaded.append((request, [load_picture(source) for source in request.encoded.images]))

        for request in requests:
            request.attempt(load, request)
        return loaded

    # -- what comes next -----------------------------------------------------------------------------------------------

    def _begin_pictures(self, requests: Sequence[Request], states: Tensor) -> None:
        for request, condition in zip(requests, self._conditions.project(states), strict=True):
            request.condition = condition
            request.candidates = [None] * request.drawing.candidates
            request.num_begun = 0
            request.wants_picture = False
            request.state = "drawing"
            if request.lone_picture:
                self._release(request)

    # -- conditions ----------------------------------------------------------------------------------------------------

    def conditions(self, prompts: Sequence[Document]) -> Tensor:
        """The UNet's conditions for drawing a picture right after each prompt, [M, Q, C]. Raises as `answers`."""
        return self._conditions.project(self._conditions.states([self._prompts.for_picture(p) for p in prompts]))

    def dream_states(self, prompts: Sequence[Document]) -> Tensor:
        """States at the dream queries after each prompt, [M, Q, H], before the condition projector."""
        return self._conditions.states([self._prompts.encode(prompt) for prompt in prompts])

    def null_states(self, negative_prompt: str = "") -> Tensor:
        """States at the dream queries after the negative or the empty prompt, [Q, H]."""
        return self._conditions.null_states(negative_prompt)

    def null_condition(self, negative_prompt: str = "") -> Tensor:
        """The condition [Q, C] that guidance leads away from, of the empty or a negative prompt.

        Those of the latest prompts are kept until a parameter they depend on changes.
        """
        return self._conditions.null(negative_prompt)
