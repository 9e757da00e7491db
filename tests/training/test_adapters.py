"""Adapters of low rank: what trains, what is written, and that processes do not change it."""

from __future__ import annotations

import io
from dataclasses import replace

import peft
import pytest
import torch
from rich.console import Console

from dreamllm.model import DreamLLM
from dreamllm.monitoring import read_samples
from dreamllm.training import LoraSettings, StageConfig, TrainingInterrupted, run
from dreamllm.training.lora import add_adapters
from dreamllm.training.step import prepare_model
from tests.tiny import tiny_model
from tests.training import shared_runs
from tests.training.ranks import run_in
from tests.training.runs import DOCUMENTS, assert_same_result, config, metrics, weights
from tests.training.test_resume import signal_at

LORA = LoraSettings(rank=2, alpha=4.0, targets=("q_proj", "o_proj", "gate_proj"))
IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])


def adapted(root, out, hook=None, **settings):
    """Stage I as ever, stage II with adapters."""
    made = config(root, out, hook, **settings)
    return replace(made, stages=(made.stages[0], replace(made.stages[1], lora=LORA, learning_rate=1e-2)))


def quietly(made):
    run(made, Console(file=io.StringIO()))


def test_adapters_train_in_the_place_of_the_layers_and_all_else_as_the_stage_says(tmp_path):
    model, _ = tiny_model(tmp_path)
    stage = StageConfig("two", "stage2", (), 10, learning_rate=1e-3, documents_per_step=2, lora=LORA)
    plain = DreamLLM(model.config)
    prepare_model(plain, replace(stage, lora=None))
    add_adapters(model, LORA, seed=0)
    prepare_model(model, stage)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {
        f"layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")
    }
    adapters = {f"language_model.model.{name}.lora_{ab}.default.weight" for name in layers for ab in "AB"}
    base = {id(p) for p in plain.parameter_groups()["language_model"]}
    others = {name for name, p in plain.named_parameters() if p.requires_grad and id(p) not in base}
    assert trained == adapters | others


def test_merged_weights_compute_what_base_and_adapter_compute_and_peft_reads_the_adapter(root, tmp_path):
    quietly(adapted(root, tmp_path))
    whole = DreamLLM.from_pretrained(tmp_path / "model").language_model.eval()
    before, after = weights(tmp_path / "one/model"), weights(tmp_path / "model")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = {name for name in changed if ".layers." in name}
    assert {name.split(".")[-2] for name in layers} == set(LORA.targets)
    base = DreamLLM.from_pretrained(tmp_path / "one/model").language_model
    for part in ("model.embed_tokens", "lm_head"):  # trained, too, and not part of the adapter
        base.get_submodule(part).load_state_dict(whole.get_submodule(part).state_dict())
    apart = peft.PeftModel.from_pretrained(base, tmp_path / "two/adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(apart(input_ids=IDS).logits, whole(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        with apart.disable_adapter():
            assert not torch.allclose(apart(input_ids=IDS).logits, whole(input_ids=IDS).logits, atol=1e-3)


def test_a_run_with_adapters_resumes_with_the_same_bits(root, tmp_path):
    quietly(adapted(root, tmp_path / "reference"))
    with pytest.raises(TrainingInterrupted):
        quietly(adapted(root, tmp_path / "out", hook=signal_at(18 * DOCUMENTS)))
    quietly(adapted(root, tmp_path / "out"))
    assert_same_result(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {"sharding": "full", "shard_frozen_above_mib": 0}),
        pytest.param(2, {"sharding": "none"}, marks=pytest.mark.slow),
        pytest.param(
            2, {"sharding": "grad_op", "precision": "bfloat16", "shard_frozen_above_mib": 0}, marks=pytest.mark.slow
        ),
        pytest.param(4, {"sharding": "hybrid", "shard_size": 2, "precision": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_adapters_and_averages_of_several_processes_are_those_of_one(root, tmp_path, world, settings):
    alone = {"precision": settings.get("precision", "float32"), "sharding": "full"}
    rough = "precision" in settings
    shared_runs.adapted(root, tmp_path / "alone", {} if not rough else alone, samples=True)
    run_in(world, shared_runs.adapted, root, tmp_path / "out", settings, True, logs=tmp_path / "logs")
    for line, other in zip(metrics(tmp_path / "out"), metrics(tmp_path / "alone"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2 if rough else 1e-5)
    if rough:
        return
    for folder in ("two/model", "two/model-ema", "model", "model-ema"):
        ours, theirs = weights(tmp_path / "out" / folder), weights(tmp_path / "alone" / folder)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            # By norms: where a gradient is all rounding, Adam moves a single weight by a part of the learning rate.
            assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    found, expected = read_samples(tmp_path / "out"), read_samples(tmp_path / "alone")
    assert [sample.text for sample in found] == [sample.text for sample in expected]


def test_settings_that_cannot_be_honoured_are_refused(tmp_path):
    model, _ = tiny_model(tmp_path)
    with pytest.raises(ValueError, match=r"lora\.targets w1: no such projections; there are down_proj, gate_proj"):
        add_adapters(model, LoraSettings(targets=("q_proj", "w1")), seed=0)
    with pytest.raises(ValueError, match="lora adapts the language_model, which is not among what trains"):
        StageConfig("one", "stage1", (), 10, learning_rate=1e-3, documents_per_step=2, lora=LORA)
    for name, value in (("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("targets", ())):
        with pytest.raises(ValueError, match=f"lora: {name} must"):
            LoraSettings(**{name: value})
