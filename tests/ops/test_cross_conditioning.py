"""cross_conditioning on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from dreamkernels import cross_conditioning
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.cross_conditioning import CASES, inputs, reference, tile_of, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, case):
    with using_cpu_isa(isa):
        assert_close_to_float64(cross_conditioning, reference, lambda: inputs(case, dtype), trials(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", [*CASES, (2, 1, 4096, 5, 64, 64)], ids=str)
def test_gpu_is_as_exact_as_eager(dtype, case):
    if tile_of(case) > (4096 if dtype == torch.float32 else 16384):
        pytest.skip("the registers of a GPU do not hold so large a head")
    assert_close_to_float64(cross_conditioning, reference, lambda: inputs(case, dtype, "cuda"), trials(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("case", [(4, 2, 49, 3, 64, 64), (3, 1, 30, 2, 77, 40), (2, 1, 4096, 5, 64, 64)], ids=str)
def test_cuda_is_as_exact_as_eager(dtype, case):
    def run(q, k, v):
        return cross_conditioning(q, k, v, None, "cuda")

    assert_close_to_float64(run, reference, lambda: inputs(case, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("case", [(2, 1, 1100, 2, 64, 64), (3, 3, 2500, 1, 77, 40)], ids=str)
def test_several_chunks_of_positions(case, dtype):
    assert_close_to_float64(cross_conditioning, reference, lambda: inputs(case, dtype))


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nearly_one_hot_weights(isa, dtype):
    with using_cpu_isa(isa):
        assert_close_to_float64(cross_conditioning, reference, lambda: inputs((2, 1, 50, 2, 64, 64), dtype, gain=30.0))


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_logits_beyond_the_range_of_the_dtype_are_finite(isa):
    """float16 products of 64 x 60000 x 1000 overflow float16 but not the float32 sums; weights stay a distribution."""
    q, k, v = (t.detach() for t in inputs((1, 1, 20, 1, 9, 64), torch.float16))
    q, k = torch.full_like(q, 60000.0), k.sign() * 1000
    with using_cpu_isa(isa):
        out = cross_conditioning(q, k, v)
    best = (q.double() * k[:, :1].double()).sum(-1)  # every position is the same
    logits = torch.einsum("bnhd,bmhd->bm", q[:, :1].double(), k.double())[0]
    assert best.isfinite().all()
    expected = v[0, logits == logits.max(), 0].double().mean(0)
    torch.testing.assert_close(out[0, :, 0].double(), expected.expand(20, -1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nan_stays_in_its_row(isa, dtype):
    q, k, v = (t.detach() for t in inputs((1, 1, 60, 1, 20, 24), dtype))
    clean = cross_conditioning(q, k, v)
    q[0, 50, 0, 3] = torch.nan
    with using_cpu_isa(isa):
        out = cross_conditioning(q, k, v)
    assert out[0, 50].isnan().all()
    keep = torch.arange(60) != 50
    torch.testing.assert_close(out[:, keep], clean[:, keep], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_agrees_with_scaled_dot_product_attention(dtype):
    """An independent implementation, with its own backward, at the shape of a UNet's second level."""
    q, k, v = inputs((2, 2, 1024, 10, 64, 64), dtype)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    ours, theirs = cross_conditioning(q, k, v), sdpa(q, k, v)
    gradient = torch.randn_like(ours)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    found, expected = (torch.autograd.grad(y, (q, k, v), gradient) for y in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, **tolerance)


def test_pictures_that_share_a_condition_add_to_its_gradient():
    q, k, v = inputs((6, 2, 40, 2, 16, 24), torch.float32)
    gradient = torch.randn_like(q)
    shared = torch.autograd.grad(cross_conditioning(q, k, v), (q, k, v), gradient)
    wide_k, wide_v = (t.detach().repeat_interleave(3, 0).requires_grad_() for t in (k, v))
    single = torch.autograd.grad(cross_conditioning(q, wide_k, wide_v), (q, wide_k, wide_v), gradient)
    assert torch.equal(shared[0], single[0])
    for a, b in zip(shared[1:], single[1:], strict=True):
        torch.testing.assert_close(a, b.view(2, 3, *b.shape[1:]).sum(1), rtol=1e-5, atol=1e-5)


def test_views_of_projections_are_read_in_place():
    """Heads within [.., heads * width] projections, keys and values as columns of one wide product."""
    wide_q, wide_kv = torch.randn(2, 50, 3 * 32), torch.randn(2, 20, 500)
    q = wide_q.unflatten(-1, (3, 32)).requires_grad_()
    k = wide_kv[:, 2:18, 100:196].unflatten(-1, (3, 32)).requires_grad_()
    v = wide_kv[:, 2:18, 196:292].unflatten(-1, (3, 32)).requires_grad_()
    plain = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    ours, expected = cross_conditioning(q, k, v), cross_conditioning(*plain)
    assert torch.equal(ours, expected)
    gradient = torch.randn(2, 3, 50, 32).transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), gradient),
        torch.autograd.grad(expected, plain, gradient.contiguous()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_dimensions_in_any_order_and_misaligned_views():
    q, k, v = (t.detach() for t in inputs((2, 1, 30, 4, 16, 24), torch.bfloat16))
    expected = cross_conditioning(q, k, v)
    assert torch.equal(cross_conditioning(q.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0), k, v), expected)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cross_conditioning(q, heads_first, v.expand(1, -1, -1, -1)), expected)
    storage = torch.empty(q.numel() + 1, dtype=q.dtype)
    misaligned = storage[1:].view(q.shape).copy_(q)
    assert torch.equal(cross_conditioning(misaligned, k, v), expected)


def test_only_needed_gradients_are_made():
    q, k, v = (t.detach() for t in inputs((2, 1, 30, 2, 16, 24), torch.float32))
    gradient = torch.randn_like(q)
    backward = OPERATORS["cross_conditioning_backward"].overloads["default"]
    both = backward(gradient, q, k, v, 0.2, True, True)
    only_q, only_kv = backward(gradient, q, k, v, 0.2, True, False), backward(gradient, q, k, v, 0.2, False, True)
    assert torch.equal(only_q[0], both[0])
    assert only_q[1].numel() == only_q[2].numel() == only_kv[0].numel() == 0
    assert torch.equal(only_kv[1], both[1])
    assert torch.equal(only_kv[2], both[2])
    k.requires_grad_()
    cross_conditioning(q, k, v).sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert v.grad is None


def test_no_positions_give_zero_gradients():
    q, k, v = inputs((2, 1, 0, 2, 16, 24), torch.bfloat16)
    for gradient in torch.autograd.grad(cross_conditioning(q, k, v).sum(), (k, v)):
        assert torch.equal(gradient, torch.zeros_like(k))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck_against_finite_differences():
    """float32 with a coarse step; the tolerance is that of the differences, not of the kernel."""
    q, k, v = inputs((2, 1, 3, 1, 5, 4), torch.float32)
    assert torch.autograd.gradcheck(cross_conditioning, (q, k, v, 0.7), eps=1e-2, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_results_repeat_bit_for_bit_with_any_number_of_threads(dtype):
    q, k, v = inputs((4, 2, 1500, 2, 33, 40), dtype)
    gradient = torch.randn_like(q)

    def everything():
        out = cross_conditioning(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), gradient)]

    assert_repeats_bitwise(everything)


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    q, k, v = inputs((2, 1, 30, 2, 16, 24), torch.bfloat16)
    with torch.no_grad():
        light = cross_conditioning(q, k, v)
    assert not light.requires_grad
    assert torch.equal(light, cross_conditioning(q, k, v))
    with torch.inference_mode():
        assert torch.equal(cross_conditioning(q, k, v), light)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    q, k, v = inputs((2, 1, 7, 2, 5, 8), dtype)
    check_operator(OPERATORS["cross_conditioning"].overloads["default"], [(q, k, v, 0.3)])
    plain = [t.detach() for t in (q, k, v)]
    check_operator(OPERATORS["cross_conditioning"].overloads["inference"], [(*plain, 0.3)])
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain]
    check_operator(
        OPERATORS["cross_conditioning_backward"].overloads["default"],
        [
            (plain[0], *plain, 0.3, True, True),
            (plain[0], *strided, 0.3, True, False),
            (plain[0], *plain, 0.3, False, True),
        ],
    )


def test_compiles_once_with_gradients_and_dynamic_pictures():
    calls = [inputs((pictures, 2, 30, 2, 16, 24), torch.bfloat16) for pictures in (2, 4, 6)]
    assert_compiles_once(cross_conditioning, calls[:1] * 2)
    detached = [[t.detach() for t in call] for call in calls]
    for call in detached:
        torch._dynamo.mark_dynamic(call[0], 0)
    assert_compiles_once(cross_conditioning, detached, backend="aot_eager")

    q, k, v = calls[0]
    compiled = torch.compile(cross_conditioning, fullgraph=True)
    expected = torch.autograd.grad(cross_conditioning(q, k, v).float().sum(), (q, k, v))
    found = torch.autograd.grad(compiled(q, k, v).float().sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 3, 8, dtype=torch.float64)}, "q has dtype torch.float64"),
        ({"k": torch.zeros(1, 4, 3, 8, dtype=torch.bfloat16)}, "k and v have dtypes torch.bfloat16 and torch.float32"),
        ({"v": torch.zeros(1, 4, 3, 8, device="meta")}, "k and v are on cpu and meta"),
        ({"q": torch.zeros(2, 5, 24)}, "do not fit; needed are q"),
        ({"v": torch.zeros(1, 5, 3, 8)}, "do not fit"),
        ({"q": torch.zeros(2, 5, 4, 8)}, "do not fit"),
        (
            {"q": torch.zeros(3, 5, 3, 8), "k": torch.zeros(2, 4, 3, 8), "v": torch.zeros(2, 4, 3, 8)},
            "3 pictures .* 2 con",
        ),
        ({"k": torch.zeros(0, 4, 3, 8), "v": torch.zeros(0, 4, 3, 8)}, "2 pictures cannot share 0 conditions"),
        ({"k": torch.zeros(1, 129, 3, 8), "v": torch.zeros(1, 129, 3, 8)}, r"129 keys are not supported \(1 to 128\)"),
        ({"k": torch.zeros(1, 0, 3, 8), "v": torch.zeros(1, 0, 3, 8)}, "0 keys are not supported"),
        ({name: torch.zeros(1, 4, 3, 161) for name in "qkv"}, r"head width 161 is not supported \(1 to 160\)"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "triton"}, "cannot run on cpu"),
        ({"implementation": "cuda"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"q": torch.zeros(2, 5, 3, 8), "k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8), **change}
    with pytest.raises(ValueError, match=message):
        cross_conditioning(**arguments)


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    operator = OPERATORS["cross_conditioning"].overloads["default"]
    q, k = torch.zeros(2, 5, 3, 8), torch.zeros(1, 4, 3, 8)
    for bad in (
        (q, k, k[:, :3]),
        (q, k[..., :7], k[..., :7]),
        (q[:1], k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1)),
    ):
        with pytest.raises(RuntimeError, match="do not fit"):
            operator(*bad, 1.0)
    with pytest.raises(RuntimeError, match="same dtype"):
        operator(q, k.half(), k.half(), 1.0)
    with pytest.raises(RuntimeError, match="not supported"):
        operator(q, k.expand(1, 4, 3, 8).repeat(1, 40, 1, 1), k.repeat(1, 40, 1, 1), 1.0)
    with pytest.raises(RuntimeError, match="grad_out"):
        OPERATORS["cross_conditioning_backward"].overloads["default"](q[:, :4], q, k, k, 1.0, True, True)
