"""The compiled CPU kernels of attention: tiles, masks, layouts and threads, at every instruction set."""

import random

import pytest
import torch

from dreamkernels import attention
from dreamkernels.ops.attention import reference
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import supported_cpu_isas, using_cpu_isa
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name

# Around the tiles: 8 or 4 rows of keys, 1 to 3 vectors of 8 or 16 queries, blocks of 96 and 128 keys.
LENGTHS = (1, 5, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 95, 97, 100, 127, 129, 200)
WIDTHS = (2, 8, 11, 16, 24, 32, 33, 40, 64, 72, 80, 96, 128, 160, 200, 256)


def random_problem(source: random.Random) -> tuple[dict, list[tuple[int, int, int]], list[tuple[int, int]] | None]:
    """Options, the shapes [T, H, D] of q, k and v, and the lengths of packed sequences, or None for a dense batch."""
    kv_heads = source.choice((1, 2))
    heads = kv_heads * source.choice((1, 1, 2, 3))
    width = source.choice(WIDTHS)
    count = source.choice((1, 2, 3))
    packed = source.random() < 0.5
    lengths = [(source.choice(LENGTHS), source.choice(LENGTHS)) for _ in range(count)]
    options = {
        "causal": source.random() < 0.5,
        "window": source.choice((None, None, 7, 20, 60)),
        "softcap": source.choice((None, None, 4.0)),
    }
    if not packed:
        lengths = lengths[:1] * count
    if options["causal"] and source.random() < 0.7:
        lengths = [(q, max(q, k)) for q, k in lengths]
    rows = [sum(pair[side] for pair in lengths) for side in (0, 1)]
    shapes = [(rows[0], heads, width), (rows[1], kv_heads, width), (rows[1], kv_heads, width)]
    return options, shapes, lengths if packed else None


def cu_seqlens_of(lengths: list[tuple[int, int]], side: int) -> torch.Tensor:
    return torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0).to(torch.int32)


def strided(shape: tuple[int, int, int], dtype: torch.dtype, batch: int | None, layout: str) -> torch.Tensor:
    tokens, heads, width = shape
    if layout == "between other columns":
        made = torch.randn(tokens, heads + 1, width + 3).to(dtype)[:, 1:, 2:-1]
    elif layout == "heads first":
        made = torch.randn(heads, tokens, width).to(dtype).transpose(0, 1)
    else:
        made = torch.randn(shape).to(dtype)
    if batch is not None:
        made = made.unflatten(0, (batch, -1))
    return made.detach().requires_grad_()


def check_random_problem(seed: int, dtype: torch.dtype) -> None:
    source = random.Random(seed)
    options, shapes, lengths = random_problem(source)
    batch = None
    cu_seqlens = [None, None]
    arguments = dict(options)
    if lengths is None:
        batch = next(n for n in (3, 2, 1) if shapes[0][0] % n == 0 and shapes[1][0] % n == 0)
    else:
        cu_seqlens = [cu_seqlens_of(lengths, side) for side in (0, 1)]
        arguments |= {"cu_seqlens_q": cu_seqlens[0], "cu_seqlens_k": cu_seqlens[1]}
        arguments |= {f"max_seqlen_{name}": max(p[side] for p in lengths) for side, name in enumerate("qk")}
    layouts = [source.choice(("contiguous", "between other columns", "heads first")) for _ in shapes]

    def inputs() -> list[torch.Tensor]:
        return [strided(shape, dtype, batch, layout) for shape, layout in zip(shapes, layouts, strict=True)]

    def ours(q, k, v):
        return attention(q, k, v, return_lse=True, implementation="cpu", **arguments)

    def definition(q, k, v):
        mask = (options["causal"], shapes[0][2] ** -0.5, options["window"] or -1, options["softcap"] or 0.0)
        return reference.attention(q, k, v, *cu_seqlens, None, *mask)

    torch.manual_seed(seed)
    smallest = min(tokens * heads * width for tokens, heads, width in shapes)
    assert_close_to_float64(ours, definition, inputs, max(1, min(60, 30000 // smallest)))


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("seed", range(0, 400, 16))
def test_random_problems_at_every_instruction_set(isa, dtype, seed):
    """Other problems for each instruction set and dtype: 300 in all."""
    level = supported_cpu_isas().index(isa)
    with using_cpu_isa(isa):
        check_random_problem(seed + 3 * level + DTYPES.index(dtype), dtype)


def everything(q, k, v, gradient, **options):
    out, lse = attention(q, k, v, return_lse=True, implementation="cpu", **options)
    return [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [gradient, torch.ones_like(lse)])]


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("tokens", [70, 1000])  # 1000 keys of two heads: grad_q is summed in parts
def test_results_do_not_depend_on_the_number_of_threads(isa, dtype, tokens):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, heads, 16).to(dtype).requires_grad_() for heads in (4, 2, 2))
    gradient = torch.randn_like(q)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with using_cpu_isa(isa):
                results.append(everything(q, k, v, gradient, causal=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_long_rows_shared_out_over_tasks_are_as_exact_as_eager(isa, dtype):
    """Several blocks of queries and keys, several tasks forward, and grad_q in parts backward."""

    def ours(q, k, v):
        return attention(q, k, v, causal=True, return_lse=True, implementation="cpu")

    def definition(q, k, v):
        return reference.attention(q, k, v, None, None, None, True, 0.25, -1, 0.0)

    def inputs():
        return [torch.randn(1, n, 1, 16).to(dtype).requires_grad_() for n in (1100, 1200, 1200)]

    torch.manual_seed(0)
    with using_cpu_isa(isa):
        assert_close_to_float64(ours, definition, inputs)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_one_visible_key_has_probability_one(isa, dtype):
    """out is that value exactly, and neither the query nor the key has a gradient: nothing is left of cancellation."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 70, 2, 40).to(dtype).requires_grad_() for _ in range(3))
    with using_cpu_isa(isa):
        out, _, grad_q, grad_k, grad_v = everything_but_lse(q, k, v)
    assert torch.equal(out, v)
    assert not grad_q.any()
    assert not grad_k.any()
    torch.testing.assert_close(grad_v, torch.ones_like(v))


def everything_but_lse(q, k, v):
    out, lse = attention(q, k, v, causal=True, window=1, return_lse=True, implementation="cpu")
    return [out, lse, *torch.autograd.grad(out, [q, k, v], torch.ones_like(out))]


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_scores_do_not_overflow(isa, dtype):
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 50, 1, 32).to(dtype) for _ in range(3))
    q[0, 7], k[0, 9] = 300.0, 300.0
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with using_cpu_isa(isa):
        results = everything(q, k, v, torch.ones_like(q))
    assert all(result.isfinite().all() for result in results)
    torch.testing.assert_close(results[0][0, 7], v[0, 9])


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_a_hidden_key_is_never_looked_at(isa):
    """Scores of hidden keys may be anything: they are replaced, not added to."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 40, 1, 24) for _ in range(3))
    expected = attention(q, k, v, causal=True, implementation="cpu")[:, :25]
    for value in (torch.nan, torch.inf, -torch.inf, 1e38):
        k[:, 25:] = value
        with using_cpu_isa(isa):
            found = attention(q, k, v, causal=True, implementation="cpu")[:, :25]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("prefix", [1, 8, 50, 96, 97, 150])
def test_constant_keys_change_no_other_gradient(isa, prefix):
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, n, heads, 24).requires_grad_() for n, heads in ((64, 2), (150, 1), (150, 1)))
    gradient = torch.randn_like(q)
    with using_cpu_isa(isa):
        full = everything(q, k, v, gradient, causal=True)
        part = everything(q, k, v, gradient, causal=True, constant_kv_prefix=prefix)
    assert all(torch.equal(a, b) for a, b in zip(full[:3], part[:3], strict=True))
    for a, b in zip(full[3:], part[3:], strict=True):
        assert torch.equal(a[:, prefix:], b[:, prefix:])
        assert not b[:, :prefix].any()


def test_the_gradient_of_out_may_have_any_layout():
    torch.manual_seed(5)
    q, k, v = (torch.randn(2, 30, 2, 16).to(torch.bfloat16).requires_grad_() for _ in range(3))
    out = attention(q, k, v, implementation="cpu")
    dense = torch.randn_like(out)
    expected = torch.autograd.grad(out, [q, k, v], dense, retain_graph=True)
    for gradient in (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        dense.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        found = torch.autograd.grad(out, [q, k, v], gradient, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    expanded = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)  # strides of zero
    ones = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32)}, "must ascend from 0 to the number of tokens, 5"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 5], dtype=torch.int32)}, "must ascend from 0"),
        ({"cu_seqlens_k": torch.tensor([1, 3, 5], dtype=torch.int32)}, "must ascend from 0"),
        ({"cu_seqlens_k": None}, "needs both of cu_seqlens_q and cu_seqlens_k"),
        ({"q": torch.zeros(5, 3, 8)}, "do not fit"),
        ({"v": torch.zeros(5, 2, 4)}, r"must be \[T, H, D\] or \[B, T, H, D\]"),
        ({"k": torch.zeros(5, 2, 8).half()}, "must have the same dtype"),
        ({"constant_kv_prefix": torch.zeros(3, dtype=torch.int32)}, "one entry per sequence, 2"),
    ],
)
def test_the_operator_itself_refuses_what_it_could_not_read_safely(change, message):
    x, cu_seqlens = torch.zeros(5, 2, 8), torch.tensor([0, 3, 5], dtype=torch.int32)
    arguments = {
        **dict.fromkeys("qkv", x),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens),
        "constant_kv_prefix": None,
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), 3),
        "causal": True,
        "scale": 1.0,
        "window": -1,
        "softcap": 0.0,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        OPERATORS["attention"].overloads["inference"](**arguments)
