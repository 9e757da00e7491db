"""The stage table, the learning-rate curve, and configurations that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from dreamllm.data import DocumentList, Part
from dreamllm.documents import Document, Text
from dreamllm.training import STAGE_LOSS_WEIGHTS, STAGE_TRAINABLE, RunConfig, RunSettings, StageConfig, learning_rate

DATA = (Part(DocumentList([Document((Text("x"),))], "one text"), size="2K"),)
LANGUAGE = {"language_model", "embeddings", "lm_head"}
JOINTS = {"visual_projector", "dream_queries", "condition_projector"}


def stage(**changes) -> StageConfig:
    values = {"name": "a", "kind": "stage2", "data": DATA, "steps": 10, "documents_per_step": 4, "learning_rate": 1e-3}
    return StageConfig(**{**values, **changes})


def test_the_stage_table_is_the_specification():
    assert {kind: set(groups) for kind, groups in STAGE_TRAINABLE.items()} == {
        "stage1_comprehension": {"visual_projector"},
        "stage1_creation": {"dream_queries", "condition_projector"},
        "stage1": JOINTS,
        "stage2": LANGUAGE | JOINTS,
        "stage3": LANGUAGE | JOINTS,
    }
    assert STAGE_LOSS_WEIGHTS == {
        "stage1_comprehension": (1, 0),
        "stage1_creation": (0, 1),
        "stage1": (1, 1),
        "stage2": (1, 10),
        "stage3": (1, 10),
    }


@pytest.mark.parametrize(("steps", "ratio"), [(100, 0.03), (1000, 0.003), (7, 0.0), (10, 1.0)])
def test_the_learning_rate_is_that_of_transformers(steps, ratio):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    warmup = -(-steps * round(ratio * 1000) // 1000)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    ours = stage(steps=steps, warmup_ratio=ratio, learning_rate=2e-3)
    for step in range(steps):
        assert learning_rate(ours, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_the_loss_scale_divides_the_weights():
    assert stage(kind="stage2").weights == (1, 10)
    assert stage(kind="stage2", loss_scale="l1_norm").weights == pytest.approx((1 / 11, 10 / 11))
    assert stage(kind="stage2", loss_scale="l2_norm").weights == pytest.approx((1 / 101**0.5, 10 / 101**0.5))
    assert stage(kind="stage2", loss_weight_vm=2.0).weights == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "stage4"}, "stage kind 'stage4' is unknown; known: stage1_comprehension"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"micro_batches": 3}, "micro_batches 3 must divide documents_per_step 4"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"condition_dropout": 1.0}, "condition_dropout"),
        ({"trainable": ("projector",)}, "trainable groups must be among language_model"),
        ({"loss_scale": "max"}, "unknown loss_scale"),
        ({"name": "../x"}, "cannot be a folder"),
        ({"name": "model"}, "cannot be a folder"),
    ],
)
def test_impossible_stages_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "float16"}, {"device": "tpu"}, {"log_every": 0}, {"workers": -1}, {"num_threads": 0},
     {"max_bad_fraction": 2.0}, {"keep_checkpoints": 0}],
)  # fmt: skip
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        RunSettings(**changes)


def test_stages_of_a_run_need_different_names(tmp_path):
    with pytest.raises(ValueError, match="stage names must differ: a, a"):
        RunConfig(tmp_path, (stage(), stage()), tmp_path)
    with pytest.raises(ValueError, match="at least one stage"):
        RunConfig(tmp_path, (), tmp_path)


def test_a_configuration_describes_itself_completely_as_json(tmp_path):
    described = RunConfig(tmp_path / "out/start", (stage(),), tmp_path / "out").describe()
    assert json.loads(json.dumps(described)) == json.loads(json.dumps(described))
    assert described["model"] == "start"
    assert described["stages"][0]["trainable"] == STAGE_TRAINABLE["stage2"]
    assert described["stages"][0]["data"][0] == {
        "kind": "DocumentList", "name": "one text", "documents": 1, "size": "2K", "weight": None,
    }  # fmt: skip
    assert RunConfig(Path("/elsewhere"), (stage(),), tmp_path).describe()["model"] == "/elsewhere"
