"""The Triton kernels of guided_step, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import guided_step
from dreamkernels.ops.guided_step import triton as kernels
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, assert_within_eager_error, check_operator
from tests.support.guided_step import DTYPES, compare, inputs, random_schedule, run_trajectory, type_names

SHAPES = ((0, 4), (2, 0), (1, 1), (3, 7), (2, 4, 18, 18), (1, 3000))


@pytest.mark.parametrize("dtypes", DTYPES, ids=type_names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_exact_as_eager(dtypes, shape):
    rescale = 0.7 if torch.Size(shape[1:]).numel() > 1 else 0.0
    for guided, per_sample, share in ((False, False, 0.0), (True, False, 0.0), (True, True, rescale)):
        compare(shape, dtypes, guided, per_sample, share, implementation="triton", trials=8 if shape[-1] < 10 else 1)


@pytest.mark.parametrize("name", ["ddpm clipped", "ddim v eta 1", "dpm++ linspace"])
def test_every_step_equals_diffusers(name):
    for step, (ours, theirs, exact) in enumerate(run_trajectory(name, implementation="triton")[1]):
        assert_within_eager_error(ours, theirs, exact, what=f"step {step}")


def test_more_elements_than_one_block_per_chunk(monkeypatch):
    """105 chunks of three blocks each: their moments are joined within a program, too."""
    real = kernels.launch_parameters

    def small_blocks(architecture, kernel, elements):
        found = real(architecture, kernel, elements)
        return found | {"block_columns": 16} if kernel == "guided_step_moments" else found

    monkeypatch.setattr(kernels, "launch_parameters", small_blocks)
    compare((1, 5000), DTYPES[0], True, False, 1.0, implementation="triton", trials=3)


def test_the_step_may_be_a_tensor_and_is_taken_to_the_nearest():
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((2, 40), DTYPES[0])
    for at, step in ((0, 0), (2, 2), (-5, 0), (7, 2)):
        for kind in (torch.int32, torch.int64):
            found = guided_step(
                latents, prediction, schedule, torch.tensor(at, dtype=kind), 2.0, 0.5, noise, history, "triton"
            )
            wanted = guided_step(latents, prediction, schedule, step, 2.0, 0.5, noise, history, "triton")
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_has_no_weight_is_not_read():
    schedule = random_schedule()
    latents, prediction, _, _ = inputs((2, 40), DTYPES[0])
    nothing = torch.full((2, 40), torch.nan)
    found = guided_step(latents, prediction, schedule, 0, 2.0, 0.0, nothing, nothing, "triton")
    wanted = guided_step(latents, prediction, schedule, 0, 2.0, implementation="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_nan_is_not_clipped_away():
    schedule = random_schedule(keeps_history=False)
    latents = torch.zeros(1, 20)
    latents[0, 3] = torch.nan
    found = guided_step(latents, torch.zeros(1, 20), schedule, 0, implementation="triton")[0]
    assert found.isnan().nonzero().tolist() == [[0, 3]]


def test_views_registration_and_compilation():
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((2, 4, 5, 5), DTYPES[1])
    at = torch.ones((), dtype=torch.int64)
    full = (latents, prediction, schedule.table, 0, at, torch.ones(2), 1.0, 0.5, noise, history, True)
    check_operator(OPERATORS["guided_step"].overloads["triton"], [full])
    strided = [x.contiguous(memory_format=torch.channels_last) for x in (latents, prediction, noise, history)]
    wanted = guided_step(latents, prediction, schedule, 1, 2.0, 0.5, noise, history, "triton")
    found = guided_step(*strided[:2], schedule, 1, 2.0, 0.5, *strided[2:], "triton")
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True))

    def run(latents, prediction, step, noise, history):
        return guided_step(latents, prediction, schedule, step, 7.5, 0.7, noise, history, "triton")

    assert_compiles_once(run, [(latents, prediction, torch.tensor(k), noise, history) for k in (0, 1)], "aot_eager")


def test_results_repeat_bit_for_bit():
    schedule = random_schedule()
    latents, prediction, noise, history = inputs((2, 4, 20, 20), DTYPES[3])
    assert_repeats_bitwise(
        lambda: guided_step(latents, prediction, schedule, 1, 7.5, 0.7, noise, history, "triton"), repeats=2
    )
