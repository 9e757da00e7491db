"""Pictures that are denoised together, each at a step of its own: they join and leave between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dreamkernels import DreamCondition, GraphedCalls, addresses_of, bucket_of, guided_step
from dreamllm.inference.drawing import DrawingOptions, check_seeds
from dreamllm.inference.loop import Noise, guide, latent_shape_of, loop_of, step_arguments
from dreamllm.model import DreamLLM
from dreamllm.model.codec import decode_latents


@dataclass(eq=False)
class PictureInWork:
    """One picture: latents and history float32 [1, c, h, w]; `steps_done` of the denoising's."""

    noise: Noise
    latents: Tensor
    prepared: Any  # its condition, as the UNet takes it
    history: Tensor | None = None
    scheduler: Any = None  # its own, where guided_step does not know the scheduler
    steps_done: int = 0


class Denoising:
    """Pictures of the same options that are drawn in one call of the UNet per step, between other work.

    A picture is that of `draw`, whatever is drawn beside it. Arguments as of `draw`; `options.candidates` and
    `options.batch_size` do not count. `graphs`: calls of the UNet are captured there, on CUDA, for numbers of pictures
    that are powers of two. Raises as `draw`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: DreamLLM,
        null_condition: Tensor | None,
        options: DrawingOptions,
        graphs: GraphedCalls | None = None,
    ) -> None:
        options = replace(options, candidates=1)
        self._model, self._shape = model, latent_shape_of(model, options)
        self._loop, self._make_scheduler = loop_of(model, options, None, None)
        if options.guided and null_condition is None:
            raise ValueError(f"guidance_scale {options.guidance_scale} needs the null condition")
        self._null = self._prepare(null_condition) if options.guided and null_condition is not None else None
        loop = self._loop
        self._graphs = None if loop.schedule is None else graphs
        timesteps = () if loop.schedule is None else loop.schedule.timesteps
        # What a captured call of the UNet depends on beside its inputs.
        self._key = (id(loop.unet), addresses_of(loop.unet.parameters()), timesteps, type(loop.times), options.guided)
        self._together: Any = None  # (count, condition) of all pictures, while they stay the same
        self.pictures: list[PictureInWork] = []
        self.steps = len(self._loop.times)

    @torch.no_grad()
    def join(self, condition: Tensor, seeds: Sequence[int]) -> list[PictureInWork]:
        """Begins a picture for each seed, all with one condition [Q, C]."""
        check_seeds(seeds, len(seeds), "picture")
        prepared = self._prepare(condition)
        joined = [self._begin(prepared, seed) for seed in seeds]
        self.pictures += joined
        self._together = None
        return joined

    def leave(self, pictures: Iterable[PictureInWork]) -> None:
        """Gives up pictures."""
        gone = set(map(id, pictures))
        if gone:
            self.pictures = [picture for picture in self.pictures if id(picture) not in gone]
            self._together = None

    @torch.no_grad()
    def step(self) -> list[PictureInWork]:
        """One denoising step of every picture. Returns those that are finished, which leave."""
        latents = torch.cat([picture.latents for picture in self.pictures])
        advance = self._advance_by_table if self._loop.schedule is not None else self._advance_by_schedulers
        advance(latents)
        for picture in self.pictures:
            picture.steps_done += 1
        finished = [picture for picture in self.pictures if picture.steps_done == self.steps]
        self.leave(finished)
        return finished

    @torch.no_grad()
    def decode(self, pictures: Sequence[PictureInWork]) -> Tensor:
        """float32 [M, channels, height, width] in [0, 1]: pictures, or what there is of them so far."""
        return decode_latents(self._model.vae, torch.cat([picture.latents for picture in pictures]))

    def _prepare(self, condition: Tensor) -> Any:
        return self._loop.prepare_condition(condition[None].to(self._model.unet.dtype))

    def _begin(self, prepared: Any, seed: int) -> PictureInWork:
        noise = Noise(self._shape, [seed], self._model.device)
        latents, schedule = noise.first().to(self._model.device), self._loop.schedule
        if schedule is not None:
            latents = latents * schedule.init_noise_sigma
            return PictureInWork(noise, latents, prepared, schedule.new_history(latents))
        scheduler = self._make_scheduler()
        return PictureInWork(noise, latents * scheduler.init_noise_sigma, prepared, scheduler=scheduler)

    def _predict(self, latents: Tensor) -> Tensor:
        steps = [picture.steps_done for picture in self.pictures]
        if self._graphs is not None:
            return self._predict_graphed(self._graphs, latents, steps)
        return self._loop.predict(latents, self._loop.time_of(steps), self._condition(len(steps)))

    def _condition(self, count: int) -> Any:
        """The prepared condition of `count` pictures; those beyond the pictures in work are as the last of them."""
        if self._together is None or self._together[0] != count:
            prepared = [picture.prepared for picture in self.pictures]
            prepared += prepared[-1:] * (count - len(prepared))
            nulls = [] if self._null is None else [self._null] * count
            self._together = count, _joined([*nulls, *prepared])
        return self._together[1]

    def _predict_graphed(self, graphs: GraphedCalls, latents: Tensor, steps: list[int]) -> Tensor:
        """The same by one launch. The batch is filled up to the next power of two; what fills it is thrown away."""
        loop, count = self._loop, bucket_of(len(steps))
        more = count - len(steps)
        latents = torch.cat([latents, latents[-1:].expand(more, *latents.shape[1:])])
        times = torch.tensor(steps + steps[-1:] * more).to(latents.device, non_blocking=True)
        condition = self._condition(count)

        def predict(latents: Tensor, times: Tensor, condition_tensor: Tensor) -> Tensor:
            prepared = condition_tensor
            if isinstance(condition, DreamCondition):
                prepared = DreamCondition(condition_tensor, condition.layers)  # type: ignore[assignment]
            return loop.predict(latents, loop.times_at(times), prepared)

        tensor = condition.columns if isinstance(condition, DreamCondition) else condition
        prediction = graphs((*self._key, type(condition)), predict, latents, times, tensor)
        return torch.cat([half[: len(steps)] for half in prediction.split(count)])

    def _advance_by_table(self, latents: Tensor) -> None:
        """By `guided_step`, once for all pictures at the same step."""
        schedule, options = self._loop.schedule, self._loop.options
        assert schedule is not None
        prediction = self._predict(latents)
        halves = prediction.chunk(2) if options.guided else (prediction,)
        scale, rescale = (options.guidance_scale, options.guidance_rescale) if options.guided else (1.0, 0.0)
        for step in sorted({picture.steps_done for picture in self.pictures}):
            rows = [row for row, picture in enumerate(self.pictures) if picture.steps_done == step]
            group = [self.pictures[row] for row in rows]
            whole = len(rows) == len(latents)
            predicted = prediction if whole else torch.cat([half[rows] for half in halves])
            noise = torch.cat([picture.noise.next() for picture in group]) if schedule.needs_noise[step] else None
            histories = [picture.history for picture in group if picture.history is not None]
            history = torch.cat(histories) if histories else None
            before = latents if whole else latents[rows]
            after, history = guided_step(before, predicted, schedule, step, scale, rescale, noise, history)
            for i, picture in enumerate(group):
                picture.latents = after[i : i + 1]
                picture.history = None if history is None else history[i : i + 1]

    def _advance_by_schedulers(self, latents: Tensor) -> None:
        """By each picture's own scheduler, which remembers where it is."""
        loop = self._loop
        times = [picture.scheduler.timesteps[picture.steps_done].to(latents.device) for picture in self.pictures]
        pairs = list(zip(self.pictures, times, strict=True))
        scaled = [picture.scheduler.scale_model_input(picture.latents, time) for picture, time in pairs]
        predicted = self._predict(torch.cat(scaled)).float()
        if loop.options.guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = guide(unconditional, conditional, loop.options)
        for row, (picture, time) in enumerate(pairs):
            extra = step_arguments(loop, picture.scheduler, picture.noise)
            moved = picture.scheduler.step(predicted[row : row + 1], time, picture.latents, **extra)
            picture.latents = moved.prev_sample


def _joined(prepared: Sequence[Any]) -> Any:
    """The prepared conditions of pictures as that of a batch."""
    first = prepared[0]
    if isinstance(first, DreamCondition):
        return DreamCondition(torch.cat([each.columns for each in prepared]), first.layers)
    return torch.cat(list(prepared))
