"""A sharded model is read piece by piece: the same bits as loading it whole, in a fraction of the memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamllm.model import DreamLLM
from dreamllm.model.weights import CheckpointError
from dreamllm.training import RunSettings
from dreamllm.training.loading import empty_model
from tests.tiny import tiny_model
from tests.training import loads
from tests.training.ranks import run_in

CASES = [
    ("stage2", {"sharding": "none"}),
    ("stage1", {"sharding": "full", "precision": "bfloat16"}),
    ("stage2", {"sharding": "grad_op", "precision": "pure_bfloat16", "fused_operators": False}),
    ("stage2", {"sharding": "hybrid", "shard_size": 1}),
    ("stage1", {"sharding": "full", "shard_frozen_above_mib": 0}),
    ("stage1_creation", {"sharding": "hybrid", "shard_size": 2, "shard_frozen_above_mib": 0, "precision": "bfloat16"}),
]


def test_every_process_reads_its_part_and_all_together_have_the_stored_bits(root, tmp_path):
    run_in(2, loads.compare, root / "start", CASES, logs=tmp_path / "logs")


def test_joined_weights_stay_joined(tmp_path):
    model, _ = tiny_model(tmp_path / "components", vae=True)
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    model.language_model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied", max_shard_size="50KB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 2
    run_in(2, loads.compare, tmp_path / "tied", [CASES[3], CASES[4]], logs=tmp_path / "logs")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_loading_takes_no_more_memory_than_what_a_process_keeps(root, tmp_path):
    folder, megabytes = write_larger(root, tmp_path / "larger")
    assert megabytes > 100
    taken = {}
    for plainly in (False, True):
        out = tmp_path / f"plainly-{plainly}"
        out.mkdir()
        run_in(2, loads.memory, folder, out, {"sharding": "full"}, plainly, logs=tmp_path / f"logs-{plainly}")
        taken[plainly] = max(int((out / f"{rank}").read_text()) for rank in range(2)) / 1e6
    assert megabytes < taken[True]
    assert taken[False] < 0.7 * megabytes  # its half, one tensor after the other, and Python's objects


def write_larger(root: Path, folder: Path) -> tuple[Path, float]:
    """A model whose language model has some 30 million parameters, and its size in megabytes of float32."""
    config = DreamLLM.config_class.from_pretrained(root / "start")
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = 8, 4096
    config.text_config.hidden_size = 256
    model = DreamLLM(config)
    model.save_pretrained(folder)
    return folder, sum(4 * parameter.numel() for parameter in model.parameters()) / 1e6


def test_a_folder_that_does_not_fit_the_model_is_refused_with_the_tensors_named(root, tmp_path):
    tensors = load_file(root / "start/model.safetensors")
    (tmp_path / "config.json").write_bytes((root / "start/config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, whole or in parts"):
        empty_model(tmp_path, torch.float32)
    tensors["dream_queries"] = tensors["dream_queries"][:2].clone()
    tensors["strange"] = tensors.pop("visual_projector.projector.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        empty_model(tmp_path, torch.float32)
    for part in ("missing: visual_projector.projector.weight", "wrong shape: dream_queries", "unexpected: strange"):
        assert part in str(refused.value)


def test_frozen_parts_are_spread_only_where_something_is_sharded():
    with pytest.raises(ValueError, match="shard_frozen_above_mib belongs to a sharding, but sharding is 'none'"):
        RunSettings(shard_frozen_above_mib=100)
    with pytest.raises(ValueError, match="shard_frozen_above_mib must not be negative"):
        RunSettings(sharding="full", shard_frozen_above_mib=-1)
