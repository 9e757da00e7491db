"""The Triton kernels of splice_embeddings, run by the interpreter on CPU tensors."""

import pytest
import torch

from dreamkernels import splice_embeddings
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.splice_embeddings import reference
from dreamkernels.testing import assert_compiles_once, assert_repeats_bitwise, check_operator
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.splice_embeddings import CASES, inputs


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [*CASES, (4, 3000, (2,))], ids=str)
def test_rows_are_copied_and_gradients_summed(case, dtype, index_dtype):
    tokens, sources, index = inputs(*case, dtype, index_dtype=index_dtype)

    def run(tokens, *sources):
        return splice_embeddings(tokens, sources, index, "triton")

    def expected(tokens, *sources):
        return reference.splice_embeddings(tokens, sources, index)

    assert_close_to_float64(run, expected, lambda: [tokens, *sources])
    assert torch.equal(run(tokens, *sources), expected(tokens, *sources))


def test_an_index_out_of_range_keeps_the_token():
    """Documented behaviour on CUDA, where checking would stop the host: no read outside the sources."""
    tokens, source = torch.randn(4, 5), torch.randn(2, 5)
    out = splice_embeddings(tokens, [source], torch.tensor([1, 2, -7, 2**40]), "triton")
    assert torch.equal(out[0], source[1])
    assert torch.equal(out[1:], tokens[1:])


def test_registration_and_compilation():
    tokens, sources, index = inputs(12, 8, (5, 3), torch.bfloat16)
    check_operator(OPERATORS["splice_embeddings"].overloads["triton"], [(tokens, sources, index)])
    backward = OPERATORS["splice_embeddings_backward"].overloads["triton"]
    check_operator(backward, [(tokens.detach(), index, [5, 3], [True, False, True])])

    def run(tokens, features, queries, index):
        return splice_embeddings(tokens, [features, queries], index, "triton")

    assert_compiles_once(run, [(tokens, *sources, index)] * 2, backend="aot_eager")


def test_results_repeat_bit_for_bit():
    tokens, sources, index = inputs(60, 9, (5, 2), torch.bfloat16)
    gradient = torch.randn_like(tokens)

    def everything():
        return torch.autograd.grad(splice_embeddings(tokens, sources, index, "triton"), [tokens, *sources], gradient)

    assert_repeats_bitwise(everything, repeats=2)
