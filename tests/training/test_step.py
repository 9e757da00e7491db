"""One step: what trains, what the losses average over, precision."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from dreamllm.data import Batches, LoaderSettings, Mixture, Pairs, Part, open_pairs
from dreamllm.model import PARAMETER_GROUPS
from dreamllm.training import STAGE_TRAINABLE, StageConfig
from dreamllm.training.step import count, make_optimizer, prepare_model, train_step
from tests.data.pictures import write_pairs
from tests.tiny import tiny_model


@pytest.fixture
def model_and_processor(tmp_path):
    return tiny_model(tmp_path / "tiny")


def make_batches(folder, processor, mode="both", documents=8, pieces=1, with_null=False):
    reader = Pairs(open_pairs(write_pairs(folder, 12)), mode, seed=1)
    settings = LoaderSettings(documents // pieces, with_null=with_null)
    made = Batches(Mixture([Part(reader)], 0), processor, settings)
    return [made[i].batch.to("cpu") for i in range(pieces)]


def stage(kind, **changes) -> StageConfig:
    values = {"data": (), "steps": 10, "documents_per_step": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    return StageConfig(kind, kind, **{**values, **changes})


def step(model, batches, configuration, optimizer=None, autocast=None):
    optimizer = optimizer or make_optimizer(prepare_model(model, configuration), configuration)
    generator = torch.Generator().manual_seed(5)
    return train_step(model, optimizer, batches, configuration, generator, autocast or contextlib.nullcontext())


@pytest.mark.parametrize("kind", list(STAGE_TRAINABLE))
def test_exactly_the_stages_parameters_change(tmp_path, model_and_processor, kind):
    model, processor = model_and_processor
    batches = make_batches(tmp_path / "data", processor)
    before = {name: [p.detach().clone() for p in group] for name, group in model.parameter_groups().items()}
    step(model, batches, stage(kind))
    assert set(before) == set(PARAMETER_GROUPS)
    changed = set()
    for name, group in model.parameter_groups().items():
        same = [torch.equal(a, b) for a, b in zip(before[name], group, strict=True)]
        assert len(set(same)) <= 1, f"only part of {name} changed"
        if not all(same):
            changed.add(name)
    assert changed == set(STAGE_TRAINABLE[kind])


@pytest.mark.parametrize("scale", ["none", "l1_norm", "l2_norm"])
def test_the_loss_is_the_models_own(tmp_path, model_and_processor, scale):
    model, processor = model_and_processor
    batches = make_batches(tmp_path / "data", processor, with_null=True)
    configuration = stage("stage2", loss_scale=scale, snr_gamma=5.0, condition_dropout=0.5, noise_offset=0.1)
    prepare_model(model, configuration)
    expected = model.forward_packed(batches[0], torch.Generator().manual_seed(5))
    lm, vm, total, _ = step(model, batches, configuration)
    torch.testing.assert_close(lm, expected.lm_loss)
    torch.testing.assert_close(vm, expected.vm_loss)
    torch.testing.assert_close(total, expected.loss)


def test_accumulation_averages_over_all_tokens_of_the_step(tmp_path, model_and_processor):
    model, processor = model_and_processor
    whole = make_batches(tmp_path / "data", processor, "comprehension")
    pieces = make_batches(tmp_path / "data", processor, "comprehension", pieces=4)
    configuration = stage("stage2", max_grad_norm=1e9)
    expected = step(model, whole, configuration)
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    found = step(tiny_model(tmp_path / "again")[0], pieces, configuration)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    model_again = tiny_model(tmp_path / "third")[0]
    step(model_again, pieces, configuration)
    for a, b in zip(gradients, (p.grad for p in model_again.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accumulation_averages_over_all_pictures_of_the_step(tmp_path, model_and_processor):
    model, processor = model_and_processor
    one = make_batches(tmp_path / "a", processor, "creation", documents=1)
    three = make_batches(tmp_path / "b", processor, "creation", documents=3)
    configuration = stage("stage1_creation")
    prepare_model(model, configuration)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        losses = [model.forward_packed(batch, generator).vm_loss for batch in (*one, *three)]
    assert step(model, [*one, *three], configuration)[1].item() == pytest.approx((losses[0] + 3 * losses[1]).item() / 4)
    assert count([*one, *three]).pictures == 4


def test_the_reported_norm_is_that_before_clipping(tmp_path, model_and_processor):
    model, processor = model_and_processor
    batches = make_batches(tmp_path / "data", processor)
    configuration = stage("stage2", max_grad_norm=1e-3)
    norm = step(model, batches, configuration)[3]
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).norm()
    assert norm > 1e-2
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_bfloat16_keeps_float32_parameters_and_moments(tmp_path, model_and_processor):
    model, processor = model_and_processor
    batches = make_batches(tmp_path / "data", processor, with_null=True)
    configuration = stage("stage2", condition_dropout=0.1)
    exact = step(tiny_model(tmp_path / "again")[0], batches, configuration)
    optimizer = make_optimizer(prepare_model(model, configuration), configuration)
    rounded = step(model, batches, configuration, optimizer, torch.autocast("cpu", torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {state[key].dtype for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }
    torch.testing.assert_close(rounded[:3], exact[:3], rtol=2e-2, atol=0)
    assert not torch.equal(rounded, exact)


def test_a_parameter_that_a_batch_does_not_reach_has_a_zero_gradient(tmp_path, model_and_processor):
    model, processor = model_and_processor
    step(model, make_batches(tmp_path / "data", processor, "creation"), stage("stage1"))
    assert all(not p.grad.any() for p in model.visual_projector.parameters())


def test_a_stage_whose_data_never_reach_its_parameters_is_an_error(tmp_path, model_and_processor):
    model, processor = model_and_processor
    batches = make_batches(tmp_path / "data", processor, "creation")
    with pytest.raises(ValueError, match=r"trains visual_projector .* no document of the step reaches them"):
        step(model, batches, stage("stage1_comprehension"))


def test_targets_and_slots_that_do_not_match_are_an_error(tmp_path, model_and_processor):
    model, processor = model_and_processor
    batch = make_batches(tmp_path / "data", processor, "creation", documents=2)[0]
    for targets in (batch.target_pixel_values[:1], batch.target_pixel_values[[0, 1, 1]]):
        with pytest.raises(ValueError, match=rf"2 dream slots but {len(targets)} target pictures"):
            step(model, [replace(batch, target_pixel_values=targets)], stage("stage1_creation"))
