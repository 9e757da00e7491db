"""The two halves of stage I, trained apart, as one model (spec D.1): their gradients do not interact."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.model.weights import CheckpointError
from dreamllm.training.configuration import STAGE_TRAINABLE
from dreamllm.training.files import write_folder
from dreamllm.training.loading import read_tensors


def merge_stage1(comprehension: Path, creation: Path, out: Path) -> None:
    """Writes the model folder `out`: what `creation` holds, with what stage I's comprehension half trained.

    `comprehension` and `creation`: model folders of the two halves, trained from the same start. Raises
    `CheckpointError` when they were not: a part that neither half trains differs; and `ValueError` when `out` holds
    something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another")
    model = DreamLLM.from_pretrained(creation, dtype="auto")
    groups = model.parameter_groups()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in STAGE_TRAINABLE["stage1_comprehension"] for p in groups[group]}
    apart = {names[id(p)] for group in STAGE_TRAINABLE["stage1_creation"] for p in groups[group]}
    own = model.state_dict()
    absent = set(taken)
    for name, tensor in read_tensors(comprehension, own):
        absent.discard(name)
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} in {comprehension} and {list(own[name].shape)} in {creation}"
            )
        if name in taken:
            own[name].copy_(tensor)
        elif name not in apart and not torch.equal(tensor.to(own[name].dtype), own[name]):
            raise CheckpointError(
                f"{name} differs between {comprehension} and {creation}, and neither half of stage I trains it: "
                "they were not trained from the same start"
            )
    if absent:
        raise CheckpointError(f"{comprehension} lacks {', '.join(sorted(absent))}")
    processor = DreamLLMProcessor.from_pretrained(creation)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    write_folder(out, fill, "the merged model")
