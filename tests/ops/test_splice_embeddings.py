"""splice_embeddings on this machine's own devices."""

import pytest
import torch

from dreamkernels import splice_embeddings
from dreamkernels.ops.debug import debug_checks
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.splice_embeddings import reference
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.splice_embeddings import CASES, inputs

GPU = [
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def check_case(tokens, sources, index, implementation="auto"):
    def run(tokens, *sources):
        return splice_embeddings(tokens, sources, index, implementation)

    def expected(tokens, *sources):
        return reference.splice_embeddings(tokens, sources, index)

    assert_close_to_float64(run, expected, lambda: [tokens, *sources])
    assert torch.equal(run(tokens, *sources), expected(tokens, *sources))


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_copied_and_gradients_summed(isa, index_dtype, dtype, case):
    with using_cpu_isa(isa):
        check_case(*inputs(*case, dtype, index_dtype=index_dtype))


@pytest.mark.parametrize("implementation", GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_copies_rows_and_sums_gradients(implementation, dtype, case):
    check_case(*inputs(*case, dtype, device="cuda"), implementation)


def test_dreamllm_layout():
    """Two documents: a picture's features once each, the same dream queries in both, text between them."""
    tokens = torch.randn(20, 6, requires_grad=True)
    features, queries = torch.randn(5, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    index = torch.full((20,), -1)
    index[2:7] = torch.arange(5)
    index[8:11] = index[15:18] = torch.arange(5, 8)
    out = splice_embeddings(tokens, [features, queries], index)
    assert torch.equal(out[2:7], features)
    assert torch.equal(out[8:11], queries)
    assert torch.equal(out[15:18], queries)
    assert torch.equal(out[11:15], tokens[11:15])
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert torch.equal(queries.grad, gradient[8:11] + gradient[15:18])
    assert torch.equal(features.grad, gradient[2:7])
    assert torch.equal(tokens.grad, torch.where((index < 0)[:, None], gradient, 0.0))


def test_many_occurrences_are_summed_in_float32():
    """4096 times the same row in bfloat16: a running bfloat16 sum would stop growing at 256."""
    query = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(4096, 4, dtype=torch.bfloat16)
    splice_embeddings(tokens, [query], torch.zeros(4096, dtype=torch.int32)).backward(torch.ones_like(tokens))
    assert query.grad.tolist() == [[4096.0] * 4]


def test_rows_that_are_placed_nowhere_get_a_zero_gradient():
    source = torch.randn(3, 4, requires_grad=True)
    splice_embeddings(torch.zeros(2, 4), [source], torch.tensor([-1, 1])).sum().backward()
    assert source.grad.tolist() == [[0.0] * 4, [1.0] * 4, [0.0] * 4]


def test_only_needed_gradients_are_made():
    tokens, (frozen, trained), index = inputs(30, 8, (4, 4), torch.float32)
    frozen = frozen.detach()
    splice_embeddings(tokens.detach(), [frozen, trained], index).sum().backward()
    assert trained.grad is not None
    assert frozen.grad is None
    assert tokens.grad is None


def test_strided_inputs_give_the_result_of_contiguous_ones():
    tokens = torch.randn(8, 20).t()
    source = torch.randn(5, 16)[:, ::2]
    index = torch.randint(-1, 5, (40,))[::2]
    assert torch.equal(
        splice_embeddings(tokens, [source], index),
        splice_embeddings(tokens.contiguous(), [source.contiguous()], index.contiguous()),
    )


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    tokens, sources, index = inputs(2000, 65, (50, 10), torch.bfloat16)
    gradient = torch.randn_like(tokens)

    def everything():
        out = splice_embeddings(tokens, sources, index)
        return [out, *torch.autograd.grad(out, [tokens, *sources], gradient)]

    assert_repeats_bitwise(everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    tokens, sources, index = inputs(12, 8, (5, 3), dtype)
    operator, backward = OPERATORS["splice_embeddings"], OPERATORS["splice_embeddings_backward"]
    check_operator(operator.overloads["default"], [(tokens, sources, index), (tokens, [], torch.full((12,), -1))])
    plain = tokens.detach()
    check_operator(operator.overloads["inference"], [(plain, [s.detach() for s in sources], index)])
    check_operator(
        backward.overloads["default"],
        [(plain, index, [5, 3], [True, True, True]), (plain, index, [5, 3], [False, False, True])],
    )


def test_compiles_once_with_gradients_and_dynamic_length():
    def run(tokens, features, queries, index):
        return splice_embeddings(tokens, [features, queries], index)

    calls = []
    for length in (12, 30, 50):
        tokens, (features, queries), index = inputs(length, 8, (5, 3), torch.bfloat16)
        calls.append((tokens, features, queries, index))
    assert_compiles_once(run, calls[:1] * 2)
    assert_compiles_once(run, calls, backend="aot_eager", dynamic=True)
    tokens, features, queries, index = calls[0]
    wanted = [tokens, features, queries]
    expected = torch.autograd.grad(run(*calls[0]).float().square().sum(), wanted)
    found = torch.autograd.grad(torch.compile(run, fullgraph=True)(*calls[0]).float().square().sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("value", "position"), [(5, 3), (-2, 0), (2**40, 6)])
def test_an_index_out_of_range_is_named(value, position):
    index = torch.full((8,), -1)
    index[position] = value
    with pytest.raises(RuntimeError, match=rf"index\[{position}\] = {value} is out of range.* 0 to 4 .* 5 source rows"):
        splice_embeddings(torch.zeros(8, 2), [torch.zeros(5, 2)], index)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_debug_checks_name_an_index_out_of_range_whatever_runs(implementation):
    index = torch.tensor([-1, 4, 5, -2])
    with debug_checks(), pytest.raises(ValueError, match=r"index\[2\] = 5 is out of range \(0 to 4, or -1\)"):
        splice_embeddings(torch.zeros(4, 2), [torch.zeros(5, 2)], index, implementation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_embeds": torch.zeros(2, 4, 3)}, "flatten the batch"),
        ({"token_embeds": torch.zeros(4, 3, dtype=torch.float64)}, "does not support"),
        ({"index": torch.zeros(4)}, "int32 or int64"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, r"index \[5\] must be \[4\]"),
        ({"index": torch.zeros(4, dtype=torch.int64, device="meta")}, "index is on meta"),
        ({"sources": [torch.zeros(2, 3), torch.zeros(2, 4)]}, r"sources\[1\] \[2, 4\] must be \[N, 3\]"),
        ({"sources": [torch.zeros(2, 3, dtype=torch.bfloat16)]}, r"sources\[0\] is torch.bfloat16"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "token_embeds": torch.zeros(4, 3),
        "sources": [torch.zeros(2, 3)],
        "index": torch.zeros(4, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        splice_embeddings(**arguments)
