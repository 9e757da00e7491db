"""The Triton kernel of append_kv, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.append_kv import CASES, Case, make, reference, runner, split
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_eager(case, dtype):
    trials = 8 if case.width < 32 else 1
    assert_close_to_float64(runner(case, "triton"), reference(case), lambda: make(case, dtype), trials)


def test_strided_states_and_caches():
    case = Case(tokens=2)
    tensors = make(case, torch.float32)
    joint = torch.cat(tensors[:3], 2).split([4, 2, 2], 2)
    expected = runner(case)(*tensors)
    heads_first = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in tensors[3:5]]
    found = runner(case, "triton")(*joint, *heads_first, *tensors[5:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [Case(), Case(page_size=4)], ids=str)
def test_what_is_out_of_range_is_not_written(case):
    """Documented behaviour on CUDA, where checking would stop the host."""
    tensors = make(case, torch.float32)
    tensors[5] = torch.tensor([5, -3, 1000], dtype=torch.int32)
    _, k_cache, v_cache = runner(case, "triton")(*tensors)
    for after, before in ((k_cache, tensors[3]), (v_cache, tensors[4])):
        assert (after != before).any(-1).any(-1).sum() == 1
    if case.page_size:
        tensors[-1][0, 1] = 999
        _, k_cache, _ = runner(case, "triton")(*tensors)
        assert torch.equal(k_cache, tensors[3])


def test_registration_and_compilation():
    case = Case(norm=True, page_size=4)
    tensors = make(case, torch.bfloat16)
    arguments, options = split(case, tensors)
    extra = (options["q_norm_weight"], options["k_norm_weight"], 1e-6, options["block_table"])
    check_operator(OPERATORS["append_kv"].overloads["triton"], [(*arguments, *extra)])
    assert_compiles_once(runner(case, "triton"), [tensors, tensors], backend="aot_eager")


def test_results_repeat_bit_for_bit():
    case = Case(tokens=5, norm=True)
    tensors = make(case, torch.bfloat16)
    assert_repeats_bitwise(lambda: runner(case, "triton")(*tensors), repeats=2)


def test_an_unsupported_width_is_named():
    case = Case(width=512, rotated=512)
    with pytest.raises(ValueError, match="width 512 is not supported by append_kv"):
        runner(case, "triton")(*make(case, torch.float32))
