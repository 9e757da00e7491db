"""softmax_groups_ on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import pytest
import torch

from dreamkernels import softmax_groups_
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.softmax_groups.reference import softmax_groups as reference
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

# Leading shape, groups, elements per group.
CASES = (
    ((0,), 2, 8),
    ((3,), 0, 4),
    ((1,), 1, 1),
    ((5,), 3, 1),
    ((7,), 5, 13),
    ((2, 9), 3, 64),
    ((11,), 2, 77),
    ((5,), 3, 128),
)


def run(x, size, implementation="auto"):
    return softmax_groups_(x.detach().clone(), size, implementation)


def inputs(case, dtype, device="cpu"):
    leading, groups, size = case
    return 3 * torch.randn(*leading, groups * size, device=device).to(dtype)


def check(case, dtype, device="cpu", implementation="auto"):
    size = case[2]
    repeats = 16 if case[1] * size < 100 else 2
    assert_close_to_float64(
        lambda x: run(x, size, implementation),
        lambda x: reference(x, size),
        lambda: [inputs(case, dtype, device)],
        repeats,
    )


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, case):
    with using_cpu_isa(isa):
        check(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_is_as_exact_as_eager(dtype, case):
    check(case, dtype, "cuda")


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_extreme_logits_and_infinities_as_in_eager(isa):
    x = torch.zeros(6, 20)
    x[0], x[1, 3], x[2, :5], x[3, 7], x[4] = 3e38, 3e38, -torch.inf, torch.nan, -3e38
    with using_cpu_isa(isa):
        torch.testing.assert_close(run(x, 20), torch.softmax(x, -1), equal_nan=True)


def test_it_works_in_place_and_repeats_with_any_number_of_threads():
    x = torch.randn(700, 320).to(torch.bfloat16)
    changed = x.clone()
    version = changed._version
    assert softmax_groups_(changed, 64) is changed
    assert changed._version > version
    assert_repeats_bitwise(lambda: run(x, 64))
    assert torch.equal(run(x, 64), changed)


def test_registration_and_compilation():
    operator = OPERATORS["softmax_groups"].overloads["default"]
    check_operator(operator, [(torch.randn(3, 40), 8), (torch.randn(2, 0), 8)])
    assert_compiles_once(lambda x: softmax_groups_(x * 2, 8) + 1, [(torch.randn(4, 32),)] * 2)


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), 4, "does not support"),
        (torch.zeros(2, 8), 0, r"groups of 0 are not supported \(1 to 128\)"),
        (torch.zeros(2, 258), 129, "groups of 129 are not supported"),
        (torch.zeros(2, 8), 3, r"x \[2, 8\] is not made of groups of 3"),
        (torch.zeros(()), 1, "not made of groups"),
        (torch.zeros(8, 2).t(), 4, "must be contiguous"),
        (torch.zeros(2, 8, requires_grad=True), 4, "has no gradient"),
    ],
)
def test_bad_arguments_are_named(x, size, message):
    with pytest.raises(ValueError, match=message):
        softmax_groups_(x, size)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    operator = OPERATORS["softmax_groups"].overloads["default"]
    for x, size in ((torch.zeros(2, 8), 3), (torch.zeros(2, 258), 129)):
        with pytest.raises(RuntimeError, match="has no groups"):
            operator(x, size)
    with pytest.raises(RuntimeError, match="contiguous"):
        operator(torch.zeros(8, 2).t(), 4)
