"""DreamLLM as a model of lmms-eval::

lmms-eval --model dreamllm --model_args pretrained=MODEL_FOLDER --tasks pope --batch_size 16
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image
from rich.console import Console

from dreamllm.documents import ChatTemplate, Document, prompt
from dreamllm.evaluation.answerer import ModelAnswerer
from dreamllm.evaluation.benchmarks.base import Decoding
from dreamllm.evaluation.progress import progress_bar
from dreamllm.inference import load

_USED = {"max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "length_penalty", "until"}


class DreamLLMForLmmsEval(lmms):
    """`pretrained`: a model folder; `dtype` of the weights. Under `accelerate launch` each process has its own GPU.

    Raises `ValueError` for an unknown model argument.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown = {name: value for name, value in unknown.items() if name != "max_batch_size"}
        if unknown:
            raise ValueError(
                f"unknown model arguments {', '.join(unknown)}; known: pretrained, device, dtype, batch_size"
            )
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            device = str(accelerator.device)
        self._batch_size = int(batch_size)
        self._answerer = ModelAnswerer(load(Path(pretrained), device, dtype, self._batch_size), self._batch_size)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those with the same settings are answered together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        texts = [""] * len(requests)
        with progress_bar(Console(stderr=True), "answering", len(requests)) as progress:
            done = 0
            for members in groups.values():
                settings = requests[members[0]].args[1]
                for start in range(0, len(members), self._batch_size):
                    rows = members[start : start + self._batch_size]
                    prompts = [self._prompt(requests[i]) for i in rows]
                    answers = self._answerer.answers(prompts, decoding_of(settings), rows)
                    for i, answer in zip(rows, answers, strict=True):
                        texts[i] = cut(answer, settings.get("until", ()))
                    done += len(rows)
                    progress(done, 0)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("dreamllm answers in text; tasks with output_type loglikelihood are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("dreamllm answers one question at a time; tasks of several rounds are not supported")

    def _prompt(self, request: Any) -> Document:
        context, _, to_pictures, number, task, split = request.args
        pictures = [picture.convert("RGB") for picture in to_pictures(self.task_dict[task][split][number]) or ()]
        return document_of(context, pictures, self._answerer.template, f"{task} {number}")


def document_of(context: str, pictures: Sequence[Image.Image], template: ChatTemplate, name: str) -> Document:
    """A question in the model's chat template. Its `<image>`s stand for the pictures, which otherwise come first."""
    if context.count("<image>") != len(pictures):
        context = "<image>" * len(pictures) + context.replace("<image>", "")
    return prompt(template.opening(first=True) + context + template.closing(), pictures, name)


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """A task's `generation_kwargs`. Warns of settings that have no counterpart here."""
    unused = [name for name, value in settings.items() if name not in _USED and value is not None]
    if unused:
        warnings.warn(f"dreamllm does not use the task's settings {', '.join(unused)}", stacklevel=2)
    beams = int(settings.get("num_beams") or 1)
    temperature = float(settings.get("temperature") or 0.0)
    if beams > 1 or settings.get("do_sample") is False:
        temperature = 0.0
    return Decoding(
        beams=beams,
        max_new_tokens=int(settings.get("max_new_tokens") or 1024),
        temperature=temperature,
        length_penalty=float(settings.get("length_penalty") or 1.0) if beams > 1 else 1.0,
        top_p=float(settings.get("top_p") or 1.0) if temperature else 1.0,
        top_k=int(settings.get("top_k") or 0) if temperature else 0,
    )


def cut(text: str, stops: str | Sequence[str]) -> str:
    """`text` before the first of `stops`."""
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
