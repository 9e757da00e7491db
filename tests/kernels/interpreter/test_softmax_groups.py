"""The Triton kernel of softmax_groups, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import softmax_groups_
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.softmax_groups.reference import softmax_groups as reference
from dreamkernels.testing import check_operator
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [(0, 2, 8), (5, 3, 1), (70, 2, 13), (20, 5, 64), (9, 2, 77), (7, 3, 128)], ids=str)
def test_is_as_exact_as_eager(case, dtype):
    rows, groups, size = case
    assert_close_to_float64(
        lambda x: softmax_groups_(x.clone(), size, "triton"),
        lambda x: reference(x, size),
        lambda: [torch.randn(rows, groups * size).to(dtype)],
        4,
    )


def test_registration():
    check_operator(OPERATORS["softmax_groups"].overloads["triton"], [(torch.randn(3, 40), 8)])
