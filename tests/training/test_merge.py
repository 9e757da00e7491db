"""Both halves of stage I in one model."""

from __future__ import annotations

import pytest
import torch

from dreamllm.cli import main
from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.model.weights import CheckpointError
from dreamllm.training import merge_stage1
from tests.tiny import tiny_model


def half(folder, groups, seed=0):
    """A model of which a half of stage I changed `groups`."""
    model, processor = tiny_model(folder / "components", seed)
    with torch.no_grad():
        for group in groups:
            for parameter in model.parameter_groups()[group]:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def test_each_part_comes_from_the_half_that_trained_it(tmp_path):
    reading = half(tmp_path / "reading", ["visual_projector"])
    drawing = half(tmp_path / "drawing", ["dream_queries", "condition_projector"])
    merge_stage1(reading, drawing, tmp_path / "out")
    merged = DreamLLM.from_pretrained(tmp_path / "out").parameter_groups()
    for group, parameters in merged.items():
        source = DreamLLM.from_pretrained(reading if group == "visual_projector" else drawing)
        assert all(map(torch.equal, parameters, source.parameter_groups()[group])), group
    assert (
        DreamLLMProcessor.from_pretrained(tmp_path / "out").layout == DreamLLMProcessor.from_pretrained(drawing).layout
    )


def test_the_command_merges_and_refuses_halves_of_different_starts(tmp_path, capsys):
    reading = half(tmp_path / "reading", ["visual_projector"])
    drawing = half(tmp_path / "drawing", ["dream_queries"])
    main(["merge", "--comprehension", str(reading), "--creation", str(drawing), str(tmp_path / "out")])
    assert (tmp_path / "out/model.safetensors").is_file()
    other = half(tmp_path / "other", ["dream_queries"], seed=5)
    with pytest.raises(CheckpointError, match=r"differs between .* they were not trained from the same start"):
        merge_stage1(reading, other, tmp_path / "again")
    with pytest.raises(SystemExit):
        main(["merge", "--comprehension", str(reading), "--creation", str(drawing), str(tmp_path / "out")])
    assert "exists and is not an empty folder" in capsys.readouterr().err
