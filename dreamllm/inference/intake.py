"""Prompts and options -> requests, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence

from dreamkernels.integrations.paged_cache import PAGE_SIZE
from dreamllm.documents import ChatTemplate, Document, Text
from dreamllm.inference.drawing import DrawingOptions, Progress, check_seeds, drawing_defaults
from dreamllm.inference.options import GenerationOptions
from dreamllm.inference.picture_work import PictureWork
from dreamllm.inference.prompts import Prompts
from dreamllm.inference.request import OnEvent, Request
from dreamllm.model import DreamLLM, DreamLLMProcessor

MOST_CHECKED = 1024
"""Drawing options that are known to be possible."""


class Intake:
    """Makes the requests of one engine."""

    def __init__(
        self,
        processor: DreamLLMProcessor,
        prompts: Prompts,
        pictures: PictureWork,
        model: DreamLLM,
        max_cache_tokens: int | None,
    ) -> None:
        self._processor, self._prompts, self._pictures, self._model = processor, prompts, pictures, model
        self._layout, self._max_cache_tokens = model.layout, max_cache_tokens
        self._checked: set[DrawingOptions] = set()

    def request(
        self,
        prompt: Document,
        options: GenerationOptions,
        seed: int,
        on_event: OnEvent | None = None,
        preview_every: int = 0,
        progress: Progress | None = None,
    ) -> Request:
        """Raises as `Engine.answers`."""
        drawing = options.drawing or drawing_defaults(self._model)
        lone = options.pictures == "force" and options.max_new_tokens == 0
        if drawing.candidates > 1 and drawing.select is None and not lone:
            raise ValueError(
                f"{drawing.candidates} candidates per picture, but writing goes on after one picture only; "
                "use candidates=1, select=FOLDER of a CLIP model, or pictures='force' with max_new_tokens=0"
            )
        if options.pictures != "forbid" and drawing not in self._checked:
            self._pictures.check(drawing)
            if drawing.guided:
                self._prompts.encode_null(drawing.negative_prompt)
            if len(self._checked) >= MOST_CHECKED:  # clients choose them: a server would keep ever more
                self._checked.clear()
            self._checked.add(drawing)
        encoded = self._prompts.encode(prompt)
        self._prompts.check_room(encoded, options)
        asked, decode = request_of(prompt, self._processor.template), self._processor.decode_text
        request = Request(
            encoded, options, drawing, seed, self._layout, decode, on_event, preview_every, progress, asked
        )
        needed, most = self.most_tokens(request), self._max_cache_tokens
        if most is not None and needed > most:
            raise ValueError(
                f"{encoded.name or 'the prompt'} may need {needed} positions of a cache of {most}; shorten it, allow "
                "fewer tokens or pictures, or raise max_cache_tokens"
            )
        return request

    def most_tokens(self, request: Request) -> int:
        """Positions that a request may come to take, in whole pages."""
        options, layout = request.options, self._layout
        most = layout.max_length
        if request.lone_picture:
            return -(-(len(request.encoded) + layout.dream_length) // PAGE_SIZE) * PAGE_SIZE
        if options.pictures == "forbid" or options.max_pictures is not None:
            picture = layout.dream_length + layout.image_length
            pictures = 0 if options.pictures == "forbid" else options.max_pictures or 0
            most = min(most, len(request.encoded) + options.max_new_tokens + pictures * picture)
        beams = options.num_beams
        return beams * (-(-most // PAGE_SIZE) + (beams > 1)) * PAGE_SIZE


def options_of(
    prompts: Sequence[Document],
    options: GenerationOptions | Sequence[GenerationOptions] | None,
    seeds: Sequence[int] | None,
) -> tuple[Sequence[GenerationOptions], Sequence[int]]:
    """Options and a seed for each prompt. Raises `ValueError` for a wrong number of them."""
    if options is None or isinstance(options, GenerationOptions):
        first = options or GenerationOptions()
        every: Sequence[GenerationOptions] = [first] * len(prompts)
        default: Sequence[int] = range(first.seed, first.seed + len(prompts))
    else:
        every, default = options, [own.seed for own in options]
        if len(every) != len(prompts):
            raise ValueError(f"{len(every)} options were given, but {len(prompts)} are needed, one per prompt")
    seeds = default if seeds is None else seeds
    check_seeds(seeds, len(prompts), "prompt")
    return every, seeds


def request_of(prompt: Document, template: ChatTemplate) -> str:
    """The last text of a prompt, in a chat the user's last message alone."""
    texts = [part.text for part in prompt.parts if isinstance(part, Text) and part.text.strip()]
    if not texts:
        return ""
    return texts[-1].removesuffix(template.closing()).rpartition(template.user_tag)[2].strip()
