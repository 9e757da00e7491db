"""attention on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dreamkernels
from dreamkernels import attention
from dreamkernels.devices import ARCHITECTURES, load_device
from dreamkernels.ops.attention import choice, external
from dreamkernels.ops.attention.reference import attention as definition
from dreamkernels.ops.operator import OPERATORS, has_kernel
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    assert_within_eager_error,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.attention import CASES, Problem, pairs
from tests.support.operators import DTYPES, assert_close_to_float64, differentiated, dtype_name, in_float64

compiled = pytest.mark.skipif(
    not has_kernel(OPERATORS["attention"].qualified(), "CPU"), reason="the CPU library is not built with attention"
)


def check(problems, dtype, implementation="cpu", device="cpu", most_trials=20):
    """Each result and gradient of several problems together: where a row sees one or two keys, as many do in small
    problems, eager is almost exact by luck, and its largest error says little."""
    actual, eager, exact = [], [], []
    for problem in problems:
        reference = problem.reference(True, device)
        for _ in range(min(most_trials, problem.trials(dtype))):
            inputs = problem.inputs(dtype, device)
            outputs, found, gradients = differentiated(problem.run(implementation, True, device), inputs, None)
            actual.append([*outputs, *found])
            for results, arguments in ((eager, inputs), (exact, in_float64(inputs))):
                outputs, found, _ = differentiated(reference, arguments, gradients)
                results.append([*outputs, *found])
    for k, name in enumerate(("out", "lse", "gradient of q", "gradient of k", "gradient of v")):
        pooled = [torch.cat([one[k].detach().flatten() for one in results]) for results in (actual, eager, exact)]
        assert_within_eager_error(*pooled, what=name)


@compiled
@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype):
    with using_cpu_isa(isa):
        check(CASES.values(), dtype)


@compiled
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("case", CASES)
def test_every_case_alone_is_as_exact_as_eager(dtype, case):
    check([CASES[case]], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gpu_is_as_exact_as_eager(dtype):
    check(CASES.values(), dtype, "triton", "cuda")


length = st.one_of(st.integers(0, 6), st.integers(0, 80), st.sampled_from([16, 32, 63, 64, 65, 128, 129]))


@st.composite
def problems(draw):
    kv_heads = draw(st.integers(1, 2))
    packed = draw(st.booleans())
    count = draw(st.integers(1, 3))
    lengths = [(draw(length), draw(length)) for _ in range(count if packed else 1)] * (1 if packed else count)
    if draw(st.booleans()):
        lengths = [(k, k) for _, k in lengths]
    prefix = tuple(draw(st.integers(0, 90)) for _ in lengths) if draw(st.booleans()) else None
    return Problem(
        tuple(lengths),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.sampled_from([1, 8, 17, 32, 40, 64, 80, 96, 128])),
        packed,
        draw(st.booleans()),
        draw(st.one_of(st.none(), st.integers(1, 70))),
        draw(st.one_of(st.none(), st.sampled_from([0.5, 3.0, 50.0]))),
        prefix,
        draw(st.sampled_from(["contiguous", "projection", "transposed"])),
    )


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@settings(
    max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(several=st.lists(problems(), min_size=25, max_size=25))
def test_random_problems_are_as_exact_as_eager(dtype, several):
    torch.manual_seed(0)
    check(several, dtype, most_trials=2)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": 5}, {"window": 5}, {"prefix": (3, 30)}], ids=str
)
@pytest.mark.parametrize("lengths", [(20, 20), (12, 30), (30, 12)], ids=str)
def test_sdpa_is_called_with_the_same_meaning(lengths, options):
    """torch's kernel need not keep our bound; in float32 another mask would be far beyond the tolerance."""
    problem = Problem((lengths,) * 2, 4, 2, 40, packed=False, **options)
    inputs = problem.inputs(torch.float32)
    found, expected = problem.run("sdpa", False)(*inputs), problem.reference(False)(*inputs)
    assert found.is_contiguous()
    gradient = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out, inputs, gradient) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def split(tensor, problem, side):
    return tensor.split([pair[side] for pair in problem.lengths])


@compiled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 12}])
def test_a_sequence_does_not_notice_what_it_is_packed_with(dtype, options):
    """Alone, in any order, or in a pack: the same bits."""
    lengths = ((40, 61), (1, 1), (77, 77), (5, 0), (0, 3), (30, 9))
    problem = Problem(lengths, 4, 2, 64, **options)
    order = torch.randperm(len(lengths)).tolist()
    shuffled = Problem(tuple(lengths[n] for n in order), 4, 2, 64, **options)
    q, k, v = problem.inputs(dtype)
    pieces = [split(t, problem, side) for t, side in ((q, 0), (k, 1), (v, 1))]
    out, lse = problem.run("cpu")(q, k, v)
    again, lse_again = shuffled.run("cpu")(*(torch.cat([part[n] for n in order]) for part in pieces))
    for n, (mine, other) in enumerate(zip(split(out, problem, 0), (split(again, shuffled, 0)), strict=False)):
        alone, _ = Problem((lengths[n],), 4, 2, 64, **options).run("cpu")(*(part[n] for part in pieces))
        assert torch.equal(mine, alone)
        assert torch.equal(split(out, problem, 0)[order[n]], other)
    lses, lses_again = lse.split([q for q, _ in lengths], 1), lse_again.split([lengths[n][0] for n in order], 1)
    assert all(torch.equal(lses[n], lses_again[position]) for position, n in enumerate(order))


@compiled
def test_a_dense_batch_is_a_pack_of_equal_sequences():
    dense = Problem(((30, 41),) * 3, 2, 1, 40, packed=False, causal=True)
    packed = Problem(dense.lengths, 2, 1, 40, causal=True)
    q, k, v = dense.inputs(torch.bfloat16)
    out, lse = dense.run("cpu")(q, k, v)
    flat, flat_lse = packed.run("cpu")(*(t.flatten(0, 1) for t in (q, k, v)))
    assert torch.equal(out.flatten(0, 1), flat)
    assert torch.equal(lse.transpose(0, 1).flatten(1), flat_lse)


@compiled
def test_permuting_the_keys_of_full_attention_changes_roundings_only():
    problem = Problem(((20, 50),), 2, 2, 64)
    order = torch.randperm(50)

    def permuted(q, k, v):
        return problem.run("cpu")(q, k[order], v[order])

    assert_close_to_float64(permuted, problem.reference(), lambda: problem.inputs(torch.float32), 20)


@compiled
def test_a_later_query_does_not_change_an_earlier_one():
    """Causality, seen from outside: the first rows are those of the shorter sequence."""
    q, k, v = Problem(pairs(50), 2, 2, 32).inputs(torch.float32)
    whole = attention(q[None], k[None], v[None], causal=True, implementation="cpu")
    k[30:].data.fill_(-7)
    v[30:].data.fill_(1e20)
    again = attention(q[None], k[None], v[None], causal=True, implementation="cpu")
    assert torch.equal(whole[:, :30], again[:, :30])
    assert (again[:, 31:] > 1e10).all()


def test_the_last_query_is_aligned_with_the_last_key():
    q, k, v = Problem(((1, 9),), 1, 1, 16, packed=False).inputs(torch.float32)
    torch.testing.assert_close(attention(q, k, v, causal=True), attention(q, k, v))
    narrow = attention(q, k, v, causal=True, window=1)
    torch.testing.assert_close(narrow, v[:, -1:])


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=compiled), "reference", "sdpa"])
def test_a_row_that_sees_no_key_is_zero_and_its_gradients_too(implementation):
    lse = implementation != "sdpa"
    for options, blind in (({"causal": True}, 5), ({}, 8)):
        q, k, v = Problem(((8, 3 if options else 0),), 2, 1, 24, packed=False).inputs(torch.bfloat16)
        result = attention(q, k, v, return_lse=lse, implementation=implementation, **options)
        out = result[0] if lse else result
        assert not out[:, :blind].any()
        if lse:
            assert (result[1][..., :blind] == -torch.inf).all()
            assert result[1][..., blind:].isfinite().all()
        gradients = torch.autograd.grad(out.float().square().sum() + (result[1].exp().sum() if lse else 0), [q, k, v])
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][:, :blind].any()


@compiled
def test_constant_keys_get_no_gradient_and_change_no_other():
    problem = Problem(pairs(40, 70, 9), 4, 2, 64, causal=True)
    constant = Problem(problem.lengths, 4, 2, 64, causal=True, prefix=(13, 70, 0))
    q, k, v = problem.inputs(torch.float32)
    full = torch.autograd.grad(problem.run("cpu", False)(q, k, v).square().sum(), [q, k, v])
    part = torch.autograd.grad(constant.run("cpu", False)(q, k, v).square().sum(), [q, k, v])
    kept = torch.ones(119, dtype=torch.bool)
    kept[:13] = kept[40:110] = False
    assert torch.equal(full[0], part[0])
    for whole, rest in zip(full[1:], part[1:], strict=True):
        assert torch.equal(whole[kept], rest[kept])
        assert not rest[~kept].any()


def test_a_prefix_given_as_a_number_holds_for_every_sequence():
    q, k, v = Problem(((6, 20),) * 2, 2, 2, 16, packed=False).inputs(torch.float32)
    gradients = [
        torch.autograd.grad(attention(q, k, v, causal=True, constant_kv_prefix=prefix).sum(), [k, v])
        for prefix in (7, torch.tensor([7, 7], dtype=torch.int32))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not gradients[0][1][:, :7].any()
    assert gradients[0][1][:, 7:].any()


@compiled
def test_a_wide_window_and_a_high_cap_change_nothing():
    problem = Problem(pairs(30), 2, 2, 32, causal=True)
    q, k, v = problem.inputs(torch.float32)
    plain = problem.run("cpu", False)(q, k, v)
    wide = Problem(pairs(30), 2, 2, 32, causal=True, window=30).run("cpu", False)(q, k, v)
    torch.testing.assert_close(wide, plain)
    capped = Problem(pairs(30), 2, 2, 32, causal=True, softcap=1e4).run("cpu", False)(q, k, v)
    torch.testing.assert_close(capped, plain, rtol=1e-4, atol=1e-5)


@compiled
def test_any_layout_gives_the_bits_of_a_contiguous_one():
    for layout in ("projection", "transposed"):
        problem = Problem(pairs(30, 40), 4, 2, 40, layout=layout, causal=True)
        strided = problem.inputs(torch.bfloat16)
        dense = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in strided]
        assert not strided[0].is_contiguous()
        for a, b in zip(problem.run("cpu")(*strided), problem.run("cpu")(*dense), strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()
    q, k, v = (torch.randn(2, 24, 10, 2).transpose(1, 3) for _ in range(3))  # the last stride is not 1
    assert torch.equal(attention(q, k, v), attention(*(t.contiguous() for t in (q, k, v))))


@compiled
def test_infinity_and_nan_in_a_value_propagate():
    q, k, v = Problem(pairs(9), 1, 1, 16, packed=False).inputs(torch.float32)
    v.data[0, 4, 0, 3] = torch.nan
    out = attention(q, k, v, causal=True, implementation="cpu")
    assert out[0, 4:, 0, 3].isnan().all()
    assert out[..., :3].isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(dtype):
    problem = Problem(pairs(200, 131, 3), 4, 2, 64, causal=True)
    q, k, v = problem.inputs(dtype)
    gradient = torch.randn_like(q)

    def everything():
        out, lse = problem.run("cpu")(q, k, v)
        return [out, lse, *torch.autograd.grad(out, [q, k, v], gradient)]

    assert_repeats_bitwise(everything)


@compiled
def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    problem = Problem(pairs(30), 2, 2, 32)
    inputs = problem.inputs(torch.bfloat16)
    with torch.no_grad():
        light = problem.run("cpu", False)(*inputs)
    assert not light.requires_grad
    assert torch.equal(light, problem.run("cpu", False)(*inputs))


def operator_arguments(problem, dtype):
    options = problem.options()
    lengths = (options.get("cu_seqlens_q"), options.get("cu_seqlens_k"), options.get("constant_kv_prefix"))
    longest = (options.get("max_seqlen_q", 0), options.get("max_seqlen_k", 0))
    mask = (problem.causal, 0.25, problem.window or -1, problem.softcap or 0.0)
    return problem.inputs(dtype), (*lengths, *longest, *mask)


def check_registration(overload, backward, case, dtype):
    (q, k, v), options = operator_arguments(CASES[case], dtype)
    check_operator(OPERATORS["attention"].overloads[overload], [(q, k, v, *options)])
    plain = [t.detach() for t in (q, k, v)]
    with torch.no_grad():
        out, lse = OPERATORS["attention"].overloads[overload](*plain, *options)
    for grad_lse in (None, torch.randn_like(lse)):
        check_operator(
            OPERATORS["attention_backward"].overloads[backward],
            [(torch.randn_like(out), grad_lse, *plain, out, lse.nan_to_num(neginf=0.0), *options)],
        )


@compiled
@pytest.mark.parametrize("case", ["queries over a cache", "UNet cross", "grouped heads"])
def test_registration(case):
    check_registration("default", "default", case, torch.bfloat16)
    (q, k, v), options = operator_arguments(CASES[case], torch.float32)
    check_operator(OPERATORS["attention"].overloads["inference"], [(q.detach(), k.detach(), v.detach(), *options)])


@compiled
def test_compiles_once_with_gradients_and_dynamic_lengths():
    def run(q, k, v):
        return attention(q, k, v, causal=True, return_lse=True, implementation="cpu")

    calls = [Problem(pairs(n, n), 2, 2, 32, packed=False).inputs(torch.bfloat16) for n in (8, 24, 40)]
    assert_compiles_once(run, calls[:1] * 2)
    assert_compiles_once(run, calls, backend="aot_eager", dynamic=True)

    compiled = torch.compile(run, fullgraph=True)
    expected = torch.autograd.grad([o.float().sum() for o in run(*calls[0])], calls[0])
    found = torch.autograd.grad([o.float().sum() for o in compiled(*calls[0])], calls[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@compiled
def test_a_pack_compiles_once_whatever_its_lengths():
    def run(q, k, v, cu_seqlens, longest):
        return attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, implementation="cpu")

    calls = []
    for lengths in ((8, 5), (20, 30), (9, 60)):
        problem = Problem(pairs(*lengths), 2, 2, 32)
        calls.append([*problem.inputs(torch.float32), problem.cu_seqlens(0), max(lengths)])
    assert_compiles_once(run, calls, backend="aot_eager", dynamic=True)


def packed(**change):
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    return {
        **dict.fromkeys("qkv", torch.zeros(5, 2, 8)),
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
        **change,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 4, 8)}, r"must be \[T, H, D\], with k and v alike"),
        ({"v": torch.zeros(4, 2, 8)}, "with k and v alike"),
        ({"q": torch.zeros(5, 2, 16)}, "must agree in batch and head width"),
        ({"q": torch.zeros(5, 3, 8)}, "3 heads, which is not a multiple of the 2 heads of k and v"),
        (dict.fromkeys("qkv", torch.zeros(5, 2, 0)), "heads of width 0"),
        (dict.fromkeys("qkv", torch.zeros(5, 2, 8, dtype=torch.float64)), "float64, which attention does not support"),
        ({"k": torch.zeros(5, 2, 8).half()}, "k is torch.float16 on cpu but q is torch.float32"),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, "v is torch.float32 on meta"),
        ({"cu_seqlens_k": None}, "both be given .* or neither"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, r"cu_seqlens_q must be int32 \[N \+ 1\], not torch.int64"),
        ({"cu_seqlens_k": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_k must be int32"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens_k is on meta"),
        ({"cu_seqlens_k": torch.tensor([0, 5], dtype=torch.int32)}, "count 2 and 1 sequences"),
        ({"max_seqlen_k": None}, "need max_seqlen_k"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"constant_kv_prefix": -1}, "must not be negative"),
        ({"constant_kv_prefix": torch.zeros(3, dtype=torch.int32)}, r"int or int32 \[2\] on cpu"),
        ({"constant_kv_prefix": torch.zeros(2)}, r"int or int32 \[2\] on cpu"),
        ({"implementation": "fast"}, r"'fast' is unknown \(auto, cpu, triton, cuda, reference, sdpa, flash_attn\)"),
        ({"implementation": "cuda"}, "no CUDA C"),
        ({"implementation": "triton"}, "cannot run on cpu"),
        ({"implementation": "flash_attn"}, "flash-attn is not installed"),
        ({"implementation": "sdpa"}, "it takes dense batches only"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**packed(**change))


def test_bad_dense_arguments_are_named():
    q = torch.zeros(2, 5, 2, 8)
    with pytest.raises(ValueError, match=r"must be \[B, T, H, D\].*give cu_seqlens_q"):
        attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="must agree in batch"):
        attention(q, q[:1], q[:1])
    with pytest.raises(ValueError, match="belong to cu_seqlens"):
        attention(q, q, q, max_seqlen_q=5)
    for options, reason in (({"return_lse": True}, "does not return the lse"), ({"softcap": 1.0}, "has no softcap")):
        with pytest.raises(ValueError, match=reason):
            attention(q, q, q, implementation="sdpa", **options)


def request(**change):
    defaults = {
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 64,
        "alignment": 8,
        "packed": True,
        "window": False,
        "softcap": False,
        "constant_kv_prefix": False,
        "return_lse": False,
    }
    return choice.Request(**{**defaults, **change})


@pytest.fixture
def fresh_choices(monkeypatch):
    monkeypatch.setattr(choice, "_choices", {})


@pytest.mark.usefixtures("fresh_choices")
def test_auto_takes_the_first_of_the_device_table_that_can_run_the_call(monkeypatch):
    assert choice.choose("auto", *request()) == "triton"
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choice.choose("auto", *request()) == "flash_attn"
    assert choice.choose("auto", *request(constant_kv_prefix=True)) == "triton"
    assert choice.choose("auto", *request(dtype=torch.float32)) == "triton"
    assert choice.choose("auto", *request(return_lse=True)) == "triton"
    assert choice.choose("auto", *request(head_dim=choice.WIDER, packed=False)) == "sdpa"
    with pytest.warns(dreamkernels.FallbackWarning, match="triton: its heads are at most 128 wide"):
        assert choice.choose("auto", *request(head_dim=choice.WIDER)) == "reference"


def test_the_tables_of_choices_say_where_they_come_from():
    for device in (*ARCHITECTURES, "cpu"):
        table = load_device(device)
        assert "measured" in table.choice_provenance
        for name, entries in table.choice.items():
            assert "max_width" not in entries[-1]  # serves every width
            assert all(set(entry["order"]) <= set(OPERATORS[name].implementations) for entry in entries)


def test_explain_says_what_would_run_and_why_not_the_others():
    q = torch.zeros(2, 5, 2, 8)
    found = dreamkernels.explain(attention, q, q, q, causal=True)
    assert found.chosen in load_device("cpu").choice["attention"][0]["order"]
    assert load_device("cpu").choice_provenance in found.reason
    assert set(found.others) == set(OPERATORS["attention"].implementations) - {found.chosen}
    assert found.others["flash_attn"] == "the package flash-attn is not installed"
    asked = dreamkernels.explain("attention", **packed(implementation="reference"))
    assert (asked.chosen, asked.reason) == ("reference", "it was asked for")
    assert asked.others["sdpa"] == "it takes dense batches only"
    with pytest.raises(ValueError, match="with k and v alike"):
        dreamkernels.explain(attention, q, q, q[:, :2])


def flash_attn_of_the_reference():
    """A module with the interface of flash-attn 2.8, by the definition: its window counts keys on either side."""

    def mask(options, causal):
        left, right = options["window_size"]
        assert options["deterministic"]
        assert right == (left if not causal or left < 0 else 0)
        window = left + 1 if left >= 0 else -1
        return causal, options["softmax_scale"], window, options["softcap"]

    def dense(q, k, v, causal, **options):
        return definition(q, k, v, None, None, None, *mask(options, causal))[0]

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **options):
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
        return definition(q, k, v, cu_seqlens_q, cu_seqlens_k, None, *mask(options, causal))[0]

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = dense, varlen
    return module


@pytest.mark.parametrize("case", ["LLaMA pack", "causal window", "window", "softcap", "UNet cross"])
def test_flash_attn_is_called_with_the_same_meaning(monkeypatch, case):
    """flash-attn needs a GPU; here its documented interface stands in for it."""
    problem = CASES[case]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_of_the_reference())
    q, k, v = problem.inputs(torch.bfloat16)
    options = problem.options()
    lengths = [options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    longest = (options.get("max_seqlen_q", 0), options.get("max_seqlen_k", 0))
    mask = (problem.causal, problem.head_dim**-0.5, problem.window or -1, problem.softcap or 0.0)
    found = external.flash_attn(q, k, v, *lengths, longest, mask)
    assert torch.equal(found, problem.reference(False)(q, k, v))
