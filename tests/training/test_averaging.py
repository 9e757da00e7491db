"""The average of the parameters over the steps: its formula, its files, and that a run with one resumes."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from dreamllm.training import EmaSettings, TrainingInterrupted, run
from dreamllm.training.averaging import Average
from tests.training.runs import DOCUMENTS, STEPS, assert_same_result, config, quiet_run, weights
from tests.training.test_resume import signal_at


class Watcher:
    """Keeps the trained parameters after every step, in float64."""

    def __init__(self):
        self.seen = {}

    def needs_model(self, step):
        return True

    def line(self, line):
        pass

    def after_step(self, stage, step, model, processor):
        values = {n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.seen.setdefault(stage, []).append(values)

    def close(self):
        pass


def weight_of(settings: EmaSettings, step: int, last: int) -> float:
    """What the parameters after `step` (0: the first ones) contribute to the average after step `last`."""
    kept = [settings.decay_at(t) for t in range(1, last + 1)]
    own = 1.0 if step == 0 else 1 - kept[step - 1]
    return own * float(torch.tensor(kept[step:], dtype=torch.float64).prod())


@pytest.mark.parametrize(
    "ema", [EmaSettings(0.9), pytest.param(EmaSettings(0.7, warmup=False), marks=pytest.mark.slow)]
)
def test_the_average_is_the_sum_of_all_parameters_so_far_with_their_weights(root, tmp_path, ema):
    watcher = Watcher()
    run(config(root, tmp_path, ema=ema), Console(file=io.StringIO()), lambda main: [watcher])
    for stage, before, found in (("one", "start", "one/model-ema"), ("two", "one/model", "model-ema")):
        first = weights((root if before == "start" else tmp_path) / before)
        values = [{name: first[name].double() for name in watcher.seen[stage][0]}, *watcher.seen[stage]]
        shares = [weight_of(ema, step, STEPS) for step in range(STEPS + 1)]
        assert sum(shares) == pytest.approx(1)
        averaged, plain = weights(tmp_path / found), weights(tmp_path / found.removesuffix("-ema"))
        for name in averaged:
            if name in values[0]:
                expected = sum(share * value[name] for share, value in zip(shares, values, strict=True))
                torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(averaged[name], plain[name])


def test_the_warm_up_forgets_the_first_parameters():
    assert [EmaSettings(0.99).decay_at(step) for step in (1, 8, 10**4)] == [2 / 11, 0.5, 0.99]
    assert EmaSettings(0.99, warmup=False).decay_at(1) == 0.99
    with pytest.raises(ValueError, match=r"ema: decay must be in \[0, 1\)"):
        EmaSettings(1.0)


def test_averages_of_bfloat16_parameters_are_kept_in_float32():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = Average({"w": parameter}, EmaSettings(0.999, warmup=False))
    parameter.data += 1
    for step in range(1, 11):
        average.update(step)
    torch.testing.assert_close(average.tensors["w"], torch.full((3,), 2 - 0.999**10))


def test_a_run_with_an_average_resumes_with_the_same_bits(root, reference, tmp_path):
    ema = EmaSettings(0.9)
    quiet_run(config(root, tmp_path / "whole", ema=ema))
    assert_same_result(tmp_path / "whole", reference)  # it does not touch what trains
    with pytest.raises(TrainingInterrupted):
        quiet_run(config(root, tmp_path / "out", signal_at(18 * DOCUMENTS), ema=ema))
    quiet_run(config(root, tmp_path / "out", ema=ema))
    for folder in ("one/model-ema", "model-ema"):
        ours, theirs = weights(tmp_path / "out" / folder), weights(tmp_path / "whole" / folder)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
