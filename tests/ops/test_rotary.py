"""rotary on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from dreamkernels import rotary, rotary_tables
from dreamkernels.nn import RotaryEmbedding
from dreamkernels.ops.debug import debug_checks
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    assert_within_eager_error,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.rotary import CASES, Case, expected, states, tables


def compare(case, dtype, device="cpu", implementation="auto", positions_dtype=torch.int64):
    cos, sin, position_ids = tables(case, dtype, device, positions_dtype)

    def run(q, k):
        return rotary(q, k, cos, sin, position_ids, layout=case.layout, implementation=implementation)

    repeats = max(1, min(32, 1024 // max(1, case.tokens * case.batch * case.rotated)))
    assert_close_to_float64(run, expected(case, cos, sin, position_ids), lambda: states(case, dtype, device), repeats)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, case):
    with using_cpu_isa(isa):
        compare(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [*CASES, Case(tokens=300, width=512, rotated=512)], ids=str)
def test_gpu_is_as_exact_as_eager(dtype, case):
    compare(case, dtype, "cuda", "triton")


def test_many_tokens_and_narrow_positions():
    compare(Case(batch=1, tokens=1500, q_heads=16, k_heads=4, width=64, rotated=64), torch.bfloat16)
    compare(Case("thd", tokens=900, positions="shared"), torch.float32, positions_dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_llama_layer_gets_what_transformers_computes(dtype):
    """An independent implementation: apply_rotary_pos_emb on the projections of a layer and LLaMA's own tables."""
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=64))
    q, k = (torch.randn(2, 10, heads * 32).view(2, 10, heads, 32).transpose(1, 2) for heads in (4, 2))
    cos, sin = embedding(q, torch.arange(10)[None])
    exact = apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    q, k, cos, sin = (t.to(dtype) for t in (q, k, cos, sin))
    exact = apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    assert_within_eager_error(rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), exact)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = torch.randn(2, 1, 1, 32)
    cos, sin = rotary_tables(200, 32)

    def score(m, n):
        rotated = [
            rotary(x, x, cos, sin, torch.tensor([p]), layout="thd")[0] for x, p in ((q[None, 0], m), (k[None, 0], n))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(17, 5), score(192, 180), rtol=1e-4, atol=1e-4)
    assert abs(score(17, 5) - score(17, 6)) > 1e-3


def test_position_zero_and_channels_beyond_the_tables_are_kept():
    q, k = torch.randn(2, 6, 3, 24).bfloat16()
    cos, sin = rotary_tables(6, 16)
    for new, old in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[..., 16:], old[..., 16:])
        assert not torch.equal(new[1:, :, :16], old[1:, :, :16])


def _views():
    """[2, 3, 5, 8] with every kind of strides that a caller can bring."""
    joint = torch.randn(2, 5, 3 * 24)
    return {
        "contiguous": torch.randn(2, 3, 5, 8),
        "transposed": torch.randn(2, 5, 3, 8).transpose(1, 2),
        "token outermost": torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3),
        "slice of a joint product": joint[..., 24:48].view(2, 5, 3, 8).transpose(1, 2),
        "expanded": torch.randn(1, 1, 5, 8).expand(2, 3, 5, 8),
        "misaligned": torch.randn(241)[1:].view(2, 3, 5, 8),
        "strided channels": torch.randn(2, 3, 5, 16)[..., ::2],
        "reversed order": torch.randn(8, 5, 3, 2).permute(3, 2, 1, 0),
    }


@pytest.mark.parametrize("name", list(_views()))
def test_views_are_rotated_like_copies_and_keep_their_memory_order(name):
    x = _views()[name]
    cos, sin = rotary_tables(5, 8)
    q, k = rotary(x, x, cos, sin)
    assert torch.equal(q, rotary(x.contiguous(), x.contiguous(), cos, sin)[0])
    assert torch.equal(q, k)
    if x.stride(-1) == 1 and sorted(x.stride()) == sorted(torch.empty_like(x).stride()):
        assert q.stride() == x.stride()
    assert q.is_contiguous() or name not in ("strided channels", "reversed order", "misaligned")
    if name == "slice of a joint product":
        assert q.transpose(1, 2).is_contiguous()
    wide = torch.stack((cos, sin), -1)
    assert torch.equal(rotary(x, x, wide[..., 0], wide[..., 1])[0], q)


def test_no_copy_is_made_of_what_transformers_brings():
    """Peak memory: outputs only. torch's profiler sees every allocation of the CPU allocator."""
    q = torch.randn(1, 64, 8, 32).transpose(1, 2)
    cos, sin = rotary_tables(64, 32)
    with torch.no_grad():
        rotary(q, q, cos, sin)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            kept = rotary(q, q, cos, sin)
            rotary(q, q, cos, sin, inplace=True)
    events = profile.profiler.kineto_results.events()
    allocated = sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)
    assert allocated == sum(t.nbytes for t in kept)


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_offsets_beyond_32_bits(isa):
    """Strides of 2^32 elements, over memory of which only the rows themselves are ever touched."""
    storage = torch.empty(2**32 + 2**12, dtype=torch.bfloat16)
    cos, sin = rotary_tables(2, 16, dtype=torch.bfloat16)
    small = torch.randn(2, 2, 16).bfloat16()
    for strides in ((2**32, 64, 1), (64, 2**32, 1)):
        q = storage.as_strided((2, 2, 16), strides)
        q.copy_(small)
        with using_cpu_isa(isa):
            found = rotary(q, q, cos, sin)[0]
            assert torch.equal(found, rotary(small, small, cos, sin)[0])
            rotary(q, small.clone(), cos, sin, inplace=True)
        assert torch.equal(q, found)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_in_place_gives_the_same_bits_in_the_same_memory(dtype, implementation):
    for case in (Case(), Case("thd", width=24, rotated=6, positions="shared"), Case("bthd", tables="batch")):
        cos, sin, position_ids = tables(case, dtype)
        q, k = (x.detach() for x in states(case, dtype))
        options = {"layout": case.layout, "implementation": implementation}
        wanted = rotary(q, k, cos, sin, position_ids, **options)
        found = rotary(q, k, cos, sin, position_ids, inplace=True, **options)
        assert found[0] is q
        assert found[1] is k
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_in_place_is_refused_where_it_would_be_wrong():
    cos, sin = rotary_tables(5, 8)
    q, k = torch.randn(2, 5, 3, 8)
    with pytest.raises(ValueError, match="inplace=True while a gradient"):
        rotary(q.requires_grad_(), k, cos, sin, inplace=True)
    with torch.no_grad():
        rotary(q, k, cos, sin, inplace=True)
        for bad in (k[:, :1].expand(5, 3, 8), torch.randn(5, 3, 16)[..., ::2]):
            with pytest.raises(ValueError, match=r"q with strides .* cannot be rotated in place"):
                rotary(bad, k, cos, sin, inplace=True)
            with pytest.raises(RuntimeError, match="out of place"):
                OPERATORS["rotary_"].overloads["default"](bad, k, cos, sin, None, False)


def test_in_place_changes_are_seen_by_autograd():
    """The version counter of q moves, so that a backward that saved q fails instead of using the wrong values."""
    q, k = torch.randn(2, 5, 3, 8)
    weight = torch.randn(8, requires_grad=True)
    y = q * weight
    cos, sin = rotary_tables(5, 8)
    rotary(q, k, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_saves_tables_and_positions_only():
    case = Case(positions="batch")
    cos, sin, position_ids = tables(case, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        q, _ = rotary(*states(case, torch.float32), cos, sin, position_ids)
    assert set(saved) == {cos.data_ptr(), sin.data_ptr(), position_ids.data_ptr()}
    assert q.requires_grad


def test_the_gradient_is_the_inverse_rotation():
    q, k = states(Case(tokens=40), torch.float32)
    cos, sin = rotary_tables(40, 16)
    found = torch.autograd.grad(rotary(q, k, cos, sin), (q, k), rotary(q.detach(), k.detach(), cos, sin))
    for gradient, x in zip(found, (q, k), strict=True):
        torch.testing.assert_close(gradient, x.detach(), rtol=1e-5, atol=1e-5)


def test_only_one_of_q_and_k_may_need_a_gradient():
    q, k = torch.randn(2, 5, 3, 8)
    cos, sin = rotary_tables(5, 8)
    q.requires_grad_()
    new_q, _ = rotary(q, k, cos, sin)
    new_q.sum().backward()
    assert torch.equal(q.grad, rotary(torch.ones_like(k), k, cos, -sin)[0])
    assert k.grad is None


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    case = Case(tokens=333, q_heads=16, k_heads=3, width=64, rotated=48, positions="batch")
    cos, sin, position_ids = tables(case, torch.bfloat16)
    q, k = states(case, torch.bfloat16)
    gradients = torch.randn_like(q), torch.randn_like(k)

    def everything():
        results = rotary(q, k, cos, sin, position_ids)
        return [t.contiguous() for t in (*results, *torch.autograd.grad(results, (q, k), gradients))]

    assert_repeats_bitwise(everything)


@pytest.mark.parametrize("case", [Case(), Case("thd", positions="shared", rotated=8), Case("bthd", tables="batch")])
def test_registration(case):
    cos, sin, position_ids = tables(case, torch.bfloat16)
    q, k = states(case, torch.bfloat16)
    rest = (cos, sin, position_ids, case.layout == "bhtd")
    plain = q.detach(), k.detach()
    check_operator(OPERATORS["rotary"].overloads["default"], [(q, k, *rest)])
    check_operator(OPERATORS["rotary"].overloads["inference"], [(*plain, *rest)])
    check_operator(OPERATORS["rotary_backward"].overloads["default"], [(*plain, *rest)])
    check_operator(OPERATORS["rotary_"].overloads["default"], [(*plain, *rest)])


@pytest.mark.parametrize("name", list(_views()))
def test_registration_of_views(name):
    x = _views()[name]
    cos, sin = rotary_tables(5, 8)
    check_operator(OPERATORS["rotary"].overloads["inference"], [(x, x, cos, sin, None, True)])


def test_compiles_once_with_gradients_and_dynamic_tokens():
    def arguments(tokens):
        case = dataclasses.replace(Case(), tokens=tokens)
        return *states(case, torch.bfloat16), *tables(case, torch.bfloat16)[:2]

    calls = [arguments(tokens) for tokens in (8, 24, 40)]
    assert_compiles_once(rotary, calls[:1] * 2)
    assert_compiles_once(rotary, calls, backend="aot_eager", dynamic=True)
    q, k, cos, sin = calls[0]
    compiled = torch.compile(rotary, fullgraph=True)
    wanted = torch.autograd.grad([o.float().square().sum() for o in rotary(q, k, cos, sin)], [q, k])
    found = torch.autograd.grad([o.float().square().sum() for o in compiled(q, k, cos, sin)], [q, k])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_in_place_compiles():
    def turn(q, k, cos, sin):
        q, k = q + 1, k + 1
        rotary(q, k, cos, sin, inplace=True)
        return q, k

    q, k = (x.detach() for x in states(Case(), torch.float32))
    assert_compiles_once(turn, [(q, k, *rotary_tables(5, 16))] * 2)


@pytest.mark.parametrize("bad", [-1, 7])
def test_a_position_outside_the_tables_is_named(bad):
    case = Case("bhtd", positions="batch")
    q, k = states(case, torch.float32)
    cos, sin = rotary_tables(7, 16)
    position_ids = torch.zeros(2, 5, dtype=torch.int32)
    position_ids[1, 3] = bad
    with pytest.raises(RuntimeError, match=rf"position_ids\[1, 3\] = {bad} is out of range.* rows 0 to 6"):
        rotary(q, k, cos, sin, position_ids)
    with pytest.raises(RuntimeError, match=rf"position_ids\[3\] = {bad} is out of range"):
        rotary(q, k, cos, sin, position_ids[1].contiguous())
    with debug_checks(), pytest.raises(ValueError, match=rf"position_ids\[1, 3\] = {bad} .*the rows of cos and sin"):
        rotary(q, k, cos, sin, position_ids, implementation="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.float64)}, "does not support"),
        ({"k": torch.zeros(2, 4, 5, 8, dtype=torch.bfloat16)}, "k is torch.bfloat16 on cpu but q is torch.float32"),
        ({"k": torch.zeros(2, 4, 5, 8, device="meta")}, "k is .* on meta"),
        ({"k": torch.zeros(2, 4, 6, 8)}, "differ in their number of heads only"),
        ({"k": torch.zeros(2, 4, 5, 10)}, "differ in their number of heads only"),
        ({"layout": "thd"}, "must have the 3 dimensions"),
        ({"layout": "bthd"}, "differ in their number of heads only"),
        ({"layout": "bthd", "k": torch.zeros(2, 4, 5, 8)}, r"cos \[5, 8\] must be \[4, R\]"),
        ({"layout": "tbhd"}, "layout 'tbhd' is unknown"),
        ({"cos": torch.zeros(5, 6)}, "must have one shape and dtype"),
        ({"sin": torch.zeros(5, 8, dtype=torch.bfloat16)}, "must have one shape and dtype"),
        ({"tables": torch.zeros(5, 8, dtype=torch.float16)}, "they must be torch.float32 or float32"),
        ({"tables": torch.zeros(5, 8, device="meta")}, "cos is on meta"),
        ({"tables": torch.zeros(5, 7)}, "cos and sin have 7 columns"),
        ({"tables": torch.zeros(5, 10)}, "cos and sin have 10 columns"),
        ({"tables": torch.zeros(())}, "cos and sin have 0 columns"),
        ({"tables": torch.zeros(6, 8)}, r"cos \[6, 8\] must be \[5, R\] or \[2 or 1, 5, R\]"),
        ({"tables": torch.zeros(3, 5, 8)}, r"cos \[3, 5, 8\] must be"),
        ({"tables": torch.zeros(5, 8, requires_grad=True)}, "requires a gradient, which rotary does not give"),
        ({"position_ids": torch.zeros(5)}, "position_ids has dtype torch.float32"),
        ({"position_ids": torch.zeros(4, dtype=torch.int64)}, r"position_ids \[4\] must be \[5\]"),
        ({"position_ids": torch.zeros(5, dtype=torch.int64, device="meta")}, "position_ids is on meta"),
        (
            {"tables": torch.zeros(1, 5, 8), "position_ids": torch.zeros(5, dtype=torch.int64)},
            r"must be \[positions, R",
        ),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "cuda"}, "no CUDA C\\+\\+ implementation"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    cos, sin = rotary_tables(5, 8)
    arguments = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 5, 8), "cos": cos, "sin": sin, **change}
    if (both := arguments.pop("tables", None)) is not None:
        arguments |= {"cos": both, "sin": both}
    with pytest.raises(ValueError, match=message):
        rotary(**arguments)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    operator = OPERATORS["rotary"].overloads["default"]
    x, cos = torch.zeros(2, 4, 5, 8), torch.zeros(5, 8)
    for arguments, message in (
        ((x[0, 0], x[0, 0], cos, cos, None, True), "3 or 4 dimensions"),
        ((x, x[:, :, :4], cos, cos, None, True), "differ in heads only"),
        ((x, x, cos[:4], cos[:4], None, True), "one row for each token"),
        ((x, x, cos, cos[:4], None, True), "equal in shape and dtype"),
        ((x, x, torch.zeros(5, 10), torch.zeros(5, 10), None, True), "width of a head"),
        ((x, x, cos.half(), cos.half(), None, True), "float32 or have the dtype of q"),
        ((x, x, cos, cos, torch.zeros(4, dtype=torch.int64), True), "one entry for each token"),
        ((x, x, cos, cos, torch.zeros(5), True), "int32 or int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


SCALINGS = (
    ({"rope_type": "default", "rope_theta": 10000.0}, {}),
    ({"rope_type": "default", "rope_theta": 500000.0}, {"base": 500000.0}),
    ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, {"scaling": "linear", "factor": 4.0}),
    (
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {"scaling": "dynamic", "factor": 2.0, "original_length": 64},
    ),
)


@pytest.mark.parametrize("length", [48, 64, 300])
@pytest.mark.parametrize(("theirs", "ours"), SCALINGS, ids=lambda value: str(value.get("rope_type", "")))
def test_tables_are_those_of_transformers(theirs, ours, length):
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=64, rope_parameters=dict(theirs)
    )
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    found = rotary_tables(length, 32, **ours)
    if ours.get("scaling") != "dynamic" or length <= 64:
        assert all(torch.equal(a, b[0]) for a, b in zip(found, wanted, strict=True))
        return
    # The stretched base is computed in float32 there and in float64 here: compare both with the formula in float64.
    base = 10000.0 * (2.0 * length / 64 - 1) ** (32 / 30)
    angles = torch.arange(length).double()[:, None] / base ** (torch.arange(0, 32, 2).double() / 32)
    angles = torch.cat((angles, angles), -1)
    assert_within_eager_error(found, [t[0] for t in wanted], [angles.cos(), angles.sin()], what="table")


def test_tables_in_another_dtype_are_rounded_once():
    wanted, found = rotary_tables(50, 16), rotary_tables(50, 16, dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(wanted, found, strict=True))
    assert rotary_tables(0, 4)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": -1}, "length -1 is negative"),
        ({"dim": 7}, "dim 7 must be even"),
        ({"dim": 0}, "dim 0 must be even"),
        ({"base": 0.0}, "base 0.0 must be positive"),
        ({"scaling": "yarn"}, "scaling 'yarn' is unknown"),
        ({"factor": 2.0}, "factor 2.0 must be"),
        ({"scaling": "linear", "factor": 0.5}, "factor 0.5 must be at least 1"),
        ({"scaling": "dynamic", "factor": 2.0}, "'dynamic' needs it"),
        ({"scaling": "linear", "factor": 2.0, "original_length": 8}, "the others have no use"),
        ({"scaling": "dynamic", "factor": 2.0, "original_length": 0}, "must be at least 1"),
        ({"scaling": "dynamic", "factor": 2.0, "original_length": 8, "dim": 2}, "no dynamic scaling"),
    ],
)
def test_bad_table_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary_tables(**{"length": 8, "dim": 4, **arguments})


def test_module():
    module = RotaryEmbedding(16, 40, base=500.0)
    assert not module.state_dict()
    assert "500.0" in repr(module)
    q, k = (x.detach() for x in states(Case(tokens=7), torch.bfloat16))
    cos, sin = rotary_tables(40, 16, 500.0)
    for positions in (None, torch.randint(0, 40, (2, 7))):
        rows = torch.arange(7) if positions is None else positions
        wanted = rotary(q, k, cos, sin, rows)
        assert all(torch.equal(a, b) for a, b in zip(module(q, k, positions), wanted, strict=True))
    packed = q[0].transpose(0, 1).contiguous()
    assert torch.equal(module(packed, packed, layout="thd")[0], rotary(packed, packed, cos[:7], sin[:7])[0])
    with pytest.raises(ValueError, match=r"41 tokens.*40 positions"):
        module(torch.zeros(41, 1, 16), torch.zeros(41, 1, 16))
    assert module.bfloat16().cos.dtype == torch.float32  # rounded angles would cost accuracy at large positions
    late = RotaryEmbedding(16, 40, base=500.0, device="meta").to_empty(device="cpu")
    assert torch.equal(late.cos, cos)
