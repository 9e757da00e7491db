"""decode_layers and few_rows_linear against float64, at every instruction set; independence of rows and threads."""

from dataclasses import dataclass

import pytest
import torch

from dreamkernels import decode_layers, few_rows_linear
from dreamkernels.ops.decode_layers import reference
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (5, 0, 37)
    layers: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    width: int = 16
    hidden: int = 48
    intermediate: int = 88
    page_size: int = 4
    rotated: int = 16
    window: int | None = None
    positions: int = 64


CASES = [
    Case(),
    Case(lengths=(9,), hidden=33, intermediate=41, width=10, rotated=6, q_heads=3, kv_heads=1),
    Case(lengths=tuple(range(11)), window=5),
    Case(lengths=(700, 3, 0, 299), layers=1, page_size=16, positions=1024, kv_heads=1),  # keys in several parts
    Case(lengths=(1,) * 18, kv_heads=4, hidden=160, intermediate=352),
]


def make(case, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g)).to(dtype)

    q, kv, h, i = case.q_heads * case.width, case.kv_heads * case.width, case.hidden, case.intermediate
    shapes = [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]
    weights = []
    for _ in range(case.layers):
        matrices = [normal(*shape, scale=shape[1] ** -0.5) for shape in shapes]
        norms = [1 + normal(h, scale=0.1) for _ in range(2)]
        weights += [norms[0], *matrices[:4], norms[1], *matrices[4:]]
    needed = [length // case.page_size + 1 for length in case.lengths]
    order = torch.randperm(sum(needed), generator=g).tolist()
    table = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    cache = normal(2 * case.layers, sum(needed), case.page_size, case.kv_heads, case.width)
    cos, sin = (f(torch.rand(case.positions, case.rotated, generator=g) * 6).to(dtype) for f in (torch.cos, torch.sin))
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    return [normal(len(needed), h), 1 + normal(h, scale=0.1), cache, lengths, table, cos, sin, *weights]


def runner(case, function=decode_layers):
    def run(x, norm, cache, lengths, table, cos, sin, *weights):
        cache = cache.clone()
        options = {"eps": 1e-5, "scale": 0.3, "window": case.window}
        if function is reference.decode_layers:
            options["window"] = -1 if case.window is None else case.window
        return function(x, list(weights), norm, cache, lengths, table, cos, sin, **options), cache

    return run


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.lengths)[:24])
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, case):
    seeds = iter(range(100))
    with using_cpu_isa(isa):
        assert_close_to_float64(
            runner(case), runner(case, reference.decode_layers), lambda: make(case, dtype, next(seeds)), trials=12
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_sequence_does_not_depend_on_the_others_by_a_bit(dtype):
    case = CASES[3]
    x, norm, cache, lengths, table, *rest = make(case, dtype)
    together, _ = runner(case)(x, norm, cache, lengths, table, *rest)
    for row, length in enumerate(case.lengths):
        used = table[row : row + 1, : length // case.page_size + 1]
        alone, _ = runner(case)(x[row : row + 1], norm, cache, lengths[row : row + 1], used, *rest)
        assert torch.equal(alone[0], together[row])


def test_threads_do_not_change_a_bit():
    case = Case(lengths=(3, 9, 20), hidden=512, intermediate=1024, width=64, rotated=64, q_heads=8, kv_heads=8)
    tensors = make(case, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [runner(case)(*tensors) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    for states, cache in results[1:]:
        assert torch.equal(states, results[0][0])
        assert torch.equal(cache, results[0][1])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("positions", torch.tensor([5, 0, 64], dtype=torch.int32), "sequence 2 writes position 64"),
        ("block_table", torch.full((3, 10), 99, dtype=torch.int32), r"block_table\[0, 0\] = 99 is not one of"),
        ("x", torch.zeros(3, 47), r"attention_norm \[48\] of layer 0 must be \[47\]"),
        ("weights", [torch.zeros(48)] * 8, "nine weights per layer"),
        ("norm_weight", torch.zeros(48).half(), r"norm_weight \[48\] .* of the dtype of x"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(argument, value, message):
    names = ("x", "norm_weight", "kv_cache", "positions", "block_table", "cos", "sin")
    *tensors, weights = (lambda t: [*t[:7], t[7:]])(make(Case(), torch.float32))
    arguments = dict(zip(names, tensors, strict=True)) | {"weights": weights}
    before = arguments["kv_cache"].clone()
    with pytest.raises(RuntimeError, match=message):
        decode_layers(**arguments | {argument: value})
    assert torch.equal(arguments["kv_cache"], before)


def test_a_gradient_is_refused():
    x, norm, cache, lengths, table, cos, sin, *weights = make(Case(), torch.float32)
    with pytest.raises(ValueError, match="decode_layers has no gradient"):
        decode_layers(x.requires_grad_(), weights, norm, cache, lengths, table, cos, sin)
    with pytest.raises(ValueError, match="few_rows_linear has no gradient"):
        few_rows_linear(x, weights[1])


def test_the_operators_are_registered_properly():
    x, norm, cache, lengths, table, cos, sin, *weights = make(Case(), torch.float32)
    arguments = (x, weights, norm, cache, lengths, table, cos, sin, 1e-6, 0.25, -1)
    check_operator(OPERATORS["decode_layers"].overloads["default"], [arguments])
    check_operator(OPERATORS["few_rows_linear"].overloads["default"], [(x, weights[1], None)])
    assert OPERATORS["decode_layers"].unavailable("triton", "cuda") == "this operator has no Triton implementation"


# -- few_rows_linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 512, 96), (7, 33, 17), (11, 1376, 5), (2, 1, 1), (0, 8, 8)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_linear_is_as_exact_as_eager(isa, dtype, rows, inputs, outputs, biased):
    g = torch.Generator().manual_seed(rows + inputs)

    def make_product():
        shapes = [(rows, inputs), (outputs, inputs), *([(outputs,)] if biased else [])]
        return [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]

    if rows == 0:
        assert few_rows_linear(*make_product()).shape == (0, outputs)
        return
    with using_cpu_isa(isa):
        assert_close_to_float64(few_rows_linear, reference.few_rows_linear, make_product, trials=8)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13])
def test_a_row_does_not_depend_on_the_others_by_a_bit(rows):
    x, weight = (torch.randn(n, 200, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (13, 70))
    whole = few_rows_linear(x, weight)
    assert torch.equal(few_rows_linear(x[:rows], weight), whole[:rows])


def test_few_rows_linear_compiles_and_repeats():
    x, weight = torch.randn(3, 64), torch.randn(130, 64)
    assert_repeats_bitwise(lambda: few_rows_linear(x, weight))
    assert_compiles_once(few_rows_linear, [(x, weight), (x + 1, weight)])


def test_few_rows_linear_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x \[2, 8\] .* and weight \[4, 9\] .* must be \[M, K\] and \[N, K\]"):
        few_rows_linear(torch.zeros(2, 8), torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"bias \[3\] torch.float32 must be \[4\]"):
        few_rows_linear(torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(3))
