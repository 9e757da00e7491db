"""No host synchronisation inside a training step; and the detector finds every kind of them."""

from __future__ import annotations

import pytest
import torch

from dreamllm.profiling import HostSynchronisations, prepare
from dreamllm.training import stage_batches
from dreamllm.workloads import STAGES, make_processor, stage_config


def ready(workload: str, precision: str = "float32", documents: int = 6):
    config = stage_config(workload, "tiny", documents_per_step=documents)
    return prepare("tiny", config, precision), stage_batches(config, make_processor("tiny"))[0].batch.to("cpu")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("workload", STAGES)
def test_a_training_step_never_waits(workload, precision):
    step, batch = ready(workload, precision)
    step.run([batch])  # tables of the noise schedule are made once
    with HostSynchronisations() as found:
        step.run([batch, batch])
    assert found.summary() == []


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: "much" if x.sum() > 0 else "little", "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index with a mask"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.repeat_interleave(torch.tensor([1] * len(x))), "repeat_interleave"),
    ],
)
def test_every_kind_of_wait_inside_a_step_is_found(read, name):
    step, batch = ready("stage2")

    def hook(*_):
        read(torch.arange(4.0))

    step.model.vision_model.register_forward_hook(hook)
    with HostSynchronisations() as found:
        step.run([batch])
    assert len(found.calls) == 1
    assert name in found.calls[0].operator
    assert found.calls[0].where.startswith("profiling/test_synchronisation.py:")


@pytest.mark.parametrize("phase", ["backward", "update"])
def test_waits_outside_the_forward_pass_are_found(phase):
    step, batch = ready("stage2")
    queries = step.model.dream_queries
    if phase == "backward":
        queries.register_hook(lambda grad: grad * grad.norm().item())
    else:
        step.optimizer.register_step_pre_hook(lambda *_: print(queries.grad.norm().item()))
    with HostSynchronisations() as found:
        step.run([batch])
    assert [call.operator for call in found.calls] == ["_local_scalar_dense"]


def test_places_are_counted():
    with HostSynchronisations() as found:
        for _ in range(3):
            torch.ones(()).item()
    (line,) = found.summary()
    assert line.startswith("3 x _local_scalar_dense at profiling/test_synchronisation.py:")


def test_ordinary_indexing_is_no_wait():
    x = torch.arange(12.0).view(3, 4)
    with HostSynchronisations() as found:
        x[torch.tensor([0, 2])]
        x[1:, None]
        torch.where(x > 2, x, 0.0)
        x.repeat_interleave(2)
        x.to(torch.bfloat16)
    assert not found.calls
