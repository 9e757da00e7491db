"""The Triton kernels of decode_attention, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import devices
from dreamkernels.ops.decode_attention.triton import choose_splits
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.decode_attention import CASES, ODD_CASES, Case, make, reference, runner, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@pytest.mark.parametrize("case", [*CASES, *ODD_CASES], ids=str)
def test_is_as_exact_as_eager(case):
    assert_close_to_float64(
        runner(case, "triton"), reference(case), lambda: make(case, torch.float32), min(5, trials(case))
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("case", [*CASES[1:6], ODD_CASES[1]], ids=str)
def test_half_precisions_are_as_exact_as_eager(case, dtype):
    assert_close_to_float64(runner(case, "triton"), reference(case), lambda: make(case, dtype))


def test_strides():
    case = Case(tokens=3, splits=2)
    q, k_cache, v_cache, lengths = make(case, torch.float32)
    expected = runner(case)(q, k_cache, v_cache, lengths)
    joint = torch.cat((torch.zeros_like(q), q), 2)[:, :, q.shape[2] :]
    caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache)]
    for a, b in zip(runner(case, "triton")(joint, *caches, lengths), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_lengths_end_with_the_cache():
    """Documented behaviour on CUDA, where checking would stop the host."""
    case = Case(lengths=(25,))
    q, k_cache, v_cache, _ = make(case, torch.float32)
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
    full, beyond = (torch.tensor([n], dtype=torch.int32) for n in (30, 1000))
    run = runner(case, "triton")
    assert torch.equal(run(q, k_cache, v_cache, beyond)[0], run(q, k_cache, v_cache, full)[0])


def test_registration_and_compilation():
    case = Case(tokens=3, page_size=16, splits=2)
    tensors = make(case, torch.bfloat16)
    check_operator(OPERATORS["decode_attention"].overloads["triton"], [(*tensors, True, 0.125, -1, 0.0, 2)])
    assert_compiles_once(runner(case, "triton"), [tensors, tensors], backend="aot_eager")


def test_results_repeat_bit_for_bit():
    case = Case(tokens=5, splits=3)
    tensors = make(case, torch.bfloat16)
    assert_repeats_bitwise(lambda: runner(case, "triton")(*tensors), repeats=2)


def test_the_parts_fill_the_device_and_are_not_too_small():
    assert choose_splits(blocks=32, capacity=4096, tile=64, multiprocessors=108) == 7  # two blocks each
    assert choose_splits(blocks=1, capacity=1024, tile=64, multiprocessors=108) == 8  # two tiles each
    assert choose_splits(blocks=1, capacity=10**6, tile=64, multiprocessors=108) == 64
    assert choose_splits(blocks=500, capacity=4096, tile=64, multiprocessors=108) == 1
    assert choose_splits(blocks=0, capacity=10, tile=64, multiprocessors=108) == 1


def test_an_unsupported_width_is_named():
    case = Case(width=300)
    with pytest.raises(ValueError, match="width 300 is not supported by decode_attention"):
        runner(case, "triton")(*make(case, torch.float32))


def test_every_architecture_has_launch_parameters():
    for architecture in devices.ARCHITECTURES:
        assert devices.launch_parameters(architecture, "decode_attention", 128)["block_keys"] == 64
