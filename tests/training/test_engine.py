"""A sharded model in one process: precisions, steps that are skipped, checkpoints, and no host synchronisation."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from dreamllm.data import Batches, LoaderSettings, Mixture, Pairs, Part, open_pairs
from dreamllm.model import DreamLLM
from dreamllm.profiling import HostSynchronisations
from dreamllm.training import NonFiniteLossError, RunSettings, StageConfig, processes
from dreamllm.training.sharding import ShardedModel
from dreamllm.training.step import Pass, count, make_optimizer, prepare_model, run_step
from tests.tiny import tiny_model
from tests.training import shared_runs
from tests.training.runs import config, metrics, quiet_run, weights
from tests.training.test_resume import stopped_run

LANES = 3
SETTINGS = RunSettings(sharding="full", device="cpu")
PRECISIONS = ("float32", "bfloat16", "pure_bfloat16")


@pytest.fixture
def alone():
    with processes("cpu", grouped=True) as these:
        yield these


def make(root, folder, kind="stage2", **options):
    """A tiny model, three batches of one document each, and the stage."""
    dtype = torch.bfloat16 if options.pop("dtype", "") == "pure_bfloat16" else torch.float32
    model, processor = tiny_model(folder)
    common = {"documents_per_step": LANES, "micro_batches": LANES, "warmup_ratio": 0.0}
    stage = StageConfig(kind, kind, (), steps=10, learning_rate=1e-2, **common, **options)
    made = Batches(Mixture([Part(Pairs(open_pairs(root / "data"), "both", seed=1))], 0), processor, LoaderSettings(1))
    prepare_model(model.to(dtype), stage)
    return model, [made[i].batch.to("cpu") for i in range(LANES)], stage


def step(through, optimizer, batches, skip=False):
    generators = [torch.Generator().manual_seed(i) for i in range(len(batches))]
    return run_step(through, optimizer, batches, generators, count(batches), skip)


def sharded(model, stage, these, **settings):
    through = ShardedModel(model, stage, replace(SETTINGS, **settings), these)
    return through, make_optimizer([p for p in model.parameters() if p.requires_grad], stage)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_trains_and_what_is_frozen_have_the_dtypes_of_the_precision(root, tmp_path, alone, precision):
    model, batches, stage = make(root, tmp_path / "a", dtype=precision)
    through, optimizer = sharded(model, stage, alone, precision=precision)
    found = step(through, optimizer, batches)
    other, _, _ = make(root, tmp_path / "b")
    exact = step(Pass(other, stage), make_optimizer([p for p in other.parameters() if p.requires_grad], stage), batches)
    rough = {"rtol": 3e-2, "atol": 0} if precision != "float32" else {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(found, exact, **rough)
    kept = torch.bfloat16 if precision == "pure_bfloat16" else torch.float32
    computes = torch.float32 if precision == "float32" else torch.bfloat16
    for parameter in model.parameters():
        assert parameter.dtype == (kept if parameter.requires_grad else computes)
        assert isinstance(parameter, DTensor) == parameter.requires_grad
        if parameter.requires_grad:
            assert parameter.grad.dtype == kept
            assert optimizer.state[parameter]["exp_avg_sq"].dtype == kept


def test_the_products_of_sharded_layers_run_in_bfloat16(root, tmp_path, alone):
    model, batches, stage = make(root, tmp_path / "a")
    through, optimizer = sharded(model, stage, alone, precision="bfloat16")
    seen = []
    projection = model.decoder.layers[1].mlp.gate_proj
    projection.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, module.weight.dtype)))
    step(through, optimizer, batches)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * LANES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_weights_are_exported_as_they_were(root, tmp_path, precision):
    out = tmp_path / "out"
    quiet_run(config(root, out, precision=precision, sharding="full"))
    before, after = weights(root / "start"), weights(out / "model")
    assert before.keys() == after.keys()
    dtype = torch.bfloat16 if precision == "pure_bfloat16" else torch.float32
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name].to(dtype))}
    frozen = {name for name in after if name.startswith(("vision_model.", "unet.", "vae."))}
    assert frozen <= same
    # Parameters in bfloat16 lose updates that are small beside them: the norms' weights stay at one.
    assert not {name for name in same - frozen if precision != "pure_bfloat16" or "norm" not in name}
    loaded = DreamLLM.from_pretrained(out / "model")
    assert json.loads((out / "model/config.json").read_text())["architectures"] == ["DreamLLM"]
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_skipped_step_changes_nothing(root, tmp_path, monkeypatch, alone, sharding):
    model, batches, stage = make(root, tmp_path / "a", weight_decay=0.1)
    if sharding == "none":
        through, optimizer = Pass(model, stage), make_optimizer(prepare_model(model, stage), stage)
    else:
        through, optimizer = sharded(model, stage, alone)
    step(through, optimizer, batches, skip=True)

    def everything():
        trained = [p for p in model.parameters() if p.requires_grad]
        state = [value for p in trained for value in (p, *optimizer.state[p].values())]
        return [(v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for v in state]

    before = everything()
    forward = DreamLLM.forward_packed

    def infinite(self, *args, **options):
        output = forward(self, *args, **options)
        output.lm_loss = output.lm_loss * float("inf")
        return output

    with monkeypatch.context() as patch:
        patch.setattr(DreamLLM, "forward_packed", infinite)
        assert not step(through, optimizer, batches, skip=True).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert step(through, optimizer, batches, skip=True).isfinite().all()
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True) if a.numel() > 1000)


def test_too_many_skipped_steps_in_a_row_stop_the_run(root, tmp_path):
    lanes = shared_runs.LANES
    settings = {"on_nonfinite": "skip", "max_consecutive_skips": 2}
    alternating = tuple(range(1, 3 * shared_runs.STEPS * lanes, 2 * lanes))  # every second step
    shared_runs.poisoned(root, tmp_path / "alternating", settings, 0, alternating)
    assert sum(line["skipped_steps"] for line in metrics(tmp_path / "alternating")) == 3 * shared_runs.STEPS // 2
    with pytest.raises(NonFiniteLossError, match=r"stage one, step 3: the loss is not finite"):
        shared_runs.poisoned(root, tmp_path / "row", settings, 0, (lanes + 1, 2 * lanes + 1))
    assert (tmp_path / "row/one/bad_batch_step_000003.pt").is_file()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_sharded_step_never_waits_for_the_device(root, tmp_path, alone, precision):
    model, batches, stage = make(root, tmp_path / "a")
    through, optimizer = sharded(model, stage, alone, precision=precision)
    step(through, optimizer, batches, skip=True)
    with HostSynchronisations() as found:
        step(through, optimizer, batches, skip=True)
    assert found.summary() == []


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_compiled_layers_train_the_same_model(root, tmp_path, sharding):
    quiet_run(shared_runs.config(root, tmp_path / "plain"))
    quiet_run(shared_runs.config(root, tmp_path / "compiled", compile_layers=True, sharding=sharding))
    for line, other in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_milestones_outlive_their_stage(root, tmp_path):
    quiet_run(config(root, tmp_path, keep_checkpoints=1, keep_every=8))
    assert [path.name for path in (tmp_path / "one/checkpoints").iterdir()] == ["step-000008"]
    assert [path.name for path in (tmp_path / "two/checkpoints").iterdir()] == ["step-000008"]


class Runs:
    """Pickles as a call."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_checkpoint_is_run(root, tmp_path):
    out = tmp_path / "out"
    stopped_run(root, out, 5)
    newest = out / "one/checkpoints/step-000006"
    (newest / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {tmp_path / 'ran'}")))
    state = json.loads((newest / "state.json").read_text())
    state["files"][".metadata"] = (newest / ".metadata").stat().st_size
    (newest / "state.json").write_text(json.dumps(state))
    printed = quiet_run(config(root, out))
    assert f"ignoring the damaged checkpoint {newest}" in printed
    assert "system, which has no place there" in printed
    assert not (tmp_path / "ran").exists()
    assert "resuming after step 4" in printed
