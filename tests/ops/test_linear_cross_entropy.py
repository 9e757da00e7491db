"""linear_cross_entropy on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import peak_extra_bytes
from dreamkernels import linear_cross_entropy
from dreamkernels.nn import LinearCrossEntropyLoss
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
from tests.support.linear_cross_entropy import IGNORED, SHAPES, assert_as_exact_as_eager, inputs, reference, trials
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name, in_float64

VARIANTS = (
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"softcap": 2.0, "z_loss": 0.01},
    {"reduction": "none", "softcap": 1.5, "z_loss": 0.02},
)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, variant, dtype, shape):
    if "softcap" in variant and shape[2] == 1:
        pytest.skip("products of width 1 round nothing away: this would compare two tanh to the last digit")
    with using_cpu_isa(isa):
        assert_as_exact_as_eager(linear_cross_entropy, lambda: inputs(shape, dtype), trials(shape), **variant)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 32008, 256)], ids=str)
def test_gpu_is_as_exact_as_eager(variant, dtype, shape, chunk):
    function = partial(linear_cross_entropy, chunk=chunk)
    assert_as_exact_as_eager(function, lambda: inputs(shape, dtype, "cuda"), trials(shape), **variant)


@pytest.mark.gpu
def test_gpu_never_waits_for_the_device():
    hidden, weight, targets = inputs((300, 1000, 64), torch.bfloat16, "cuda")
    gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("chunk", [1, 16, 40, 75, 1000])
def test_the_chunk_changes_nothing_beyond_rounding(isa, dtype, chunk):
    """One, two (which add inside the product) and more chunks (which have sums beside the gradient)."""
    with using_cpu_isa(isa):
        assert_as_exact_as_eager(
            partial(linear_cross_entropy, chunk=chunk), lambda: inputs((100, 260, 40), dtype, ignored=0.1)
        )


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_many_chunks_do_not_add_up_rounding_errors(isa):
    """Were the bfloat16 weight gradient itself the running sum, 64 chunks would each round it; the sums are float32."""
    hidden, weight, targets = inputs((1024, 64, 32), torch.bfloat16, ignored=0.0)
    with using_cpu_isa(isa):
        (ours,) = gradients(linear_cross_entropy(hidden, weight, targets, chunk=16), weight)
    (eager,) = gradients(reference(hidden, weight, targets), weight)
    wide, wide_weight, _ = in_float64([hidden, weight, targets])
    (exact,) = gradients(reference(wide, wide_weight, targets), wide_weight)
    assert_within_eager_error(ours, eager, exact)


def test_ignoring_rows_equals_dropping_them():
    hidden, weight, targets = inputs((90, 200, 32), torch.bfloat16, ignored=0.6)
    kept = targets != IGNORED
    for reduction in ("mean", "sum"):
        all_rows = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        some = hidden.detach()[kept].requires_grad_()
        few_rows = linear_cross_entropy(some, weight, targets[kept], reduction=reduction)
        assert torch.equal(all_rows, few_rows)
        grad_hidden, grad_weight = gradients(all_rows, hidden, weight)
        few_hidden, few_weight = gradients(few_rows, some, weight)
        assert torch.equal(grad_hidden[kept], few_hidden)
        assert not grad_hidden[~kept].any()
        assert torch.equal(grad_weight, few_weight)


def test_what_stands_in_ignored_rows_does_not_matter():
    hidden, weight, targets = inputs((40, 50, 16), torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets)
    broken = torch.where((targets == IGNORED)[:, None], torch.nan, hidden.detach()).requires_grad_()
    loss = linear_cross_entropy(broken, weight, targets)
    assert torch.equal(loss, expected)
    for found, wanted in zip(gradients(loss, broken, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_the_order_of_tokens_does_not_matter(dtype):
    def permuted(hidden, weight, targets):
        order = torch.randperm(hidden.shape[0])
        return linear_cross_entropy(hidden[order], weight, targets[order], chunk=32)

    assert_as_exact_as_eager(permuted, lambda: inputs((100, 120, 24), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_any_target_loss_and_gradients_are_zero(reduction, dtype):
    hidden, weight, targets = inputs((20, 30, 8), dtype, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert loss.shape == (targets.shape if reduction == "none" else ())
    assert not loss.any()
    assert not any(gradient.any() for gradient in gradients(loss.sum(), hidden, weight))


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_large_logits_neither_overflow_nor_vanish(isa):
    hidden, weight, targets = inputs((30, 70, 20), torch.float32)
    with using_cpu_isa(isa):
        assert_as_exact_as_eager(
            linear_cross_entropy, lambda: [hidden.detach().mul(1e4).requires_grad_(), weight, targets]
        )


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_nan_and_infinity_of_a_row_reach_its_loss_only(isa):
    hidden, weight, targets = (t.detach() for t in inputs((4, 37, 3), torch.float32, ignored=0.0))
    hidden[1, 0], hidden[2, 1] = torch.nan, torch.inf
    with using_cpu_isa(isa):
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_needed_gradients_are_made(reduction):
    hidden, weight, targets = inputs((33, 60, 16), torch.float32)
    expected = gradients(linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum(), hidden, weight)
    (of_hidden,) = gradients(linear_cross_entropy(hidden, weight.detach(), targets, reduction=reduction).sum(), hidden)
    (of_weight,) = gradients(linear_cross_entropy(hidden.detach(), weight, targets, reduction=reduction).sum(), weight)
    assert torch.equal(of_hidden, expected[0])
    assert torch.equal(of_weight, expected[1])
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


def test_frozen_sides_cost_no_memory():
    operator = OPERATORS["linear_cross_entropy"].overloads["inference"]
    plain = [t.detach() for t in inputs((33, 60, 16), torch.float32)]
    for wanted in ((True, False), (False, True), (False, False)):
        _, grad_hidden, grad_weight = operator(*plain, IGNORED, 1, 0.0, 0.0, 0, *wanted)
        assert (grad_hidden.numel() > 0, grad_weight.numel() > 0) == wanted


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_logits_never_exist(weight_grad, ignored):
    """2048 rows of 8192 bfloat16 logits are 32 MiB, 128 of them 2 MiB."""
    hidden, weight, targets = inputs((2048, 8192, 32), torch.bfloat16, ignored=ignored)
    weight.requires_grad_(weight_grad)
    wanted = [hidden, weight] if weight_grad else [hidden]

    def call(hidden, weight, targets, chunk):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        return loss, *gradients(loss, *wanted)

    def logits(rows):
        return 2 * rows * weight.shape[0]

    peaks = [peak_extra_bytes(call, (hidden, weight, targets, chunk), "cpu") for chunk in (128, 512)]
    # Beside the logits: rows of the width of hidden, and for the weight gradient its sums, a part of it, a slice of the
    # logits.
    beside = 4 * 2 * hidden.numel() + (3 * 2 * weight.numel() + logits(128) if weight_grad else 0)
    assert logits(64) < peaks[0] <= logits(128) + beside < logits(2048) // 2
    assert peaks[0] < peaks[1] <= logits(512) + beside + logits(384) < logits(2048)


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_the_gradient_of_a_scalar_loss_scales_the_gradients_with_one_rounding(isa, dtype):
    hidden, weight, targets = inputs((40, 50, 17), dtype)
    with using_cpu_isa(isa):
        ones = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
        scaled = torch.autograd.grad(
            linear_cross_entropy(hidden, weight, targets), (hidden, weight), torch.tensor(0.37)
        )
    for one, found in zip(ones, scaled, strict=True):
        assert torch.equal(found, (one.float() * 0.37).to(dtype))


def test_an_early_gradient_is_given_away_once():
    """The gradients of the forward belong to the first backward; a second one through the same graph makes its own."""
    hidden, weight, targets = inputs((40, 50, 16), torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    first = [hidden.grad, weight.grad]
    copies = [gradient.clone() for gradient in first]
    hidden.grad = weight.grad = None
    loss.backward(torch.tensor(-3.0))
    for mine, copy, second in zip(first, copies, (hidden.grad, weight.grad), strict=True):
        assert torch.equal(mine, copy)
        torch.testing.assert_close(second, -3.0 * copy)


def test_float16_keeps_gradients_that_a_loss_scale_lifts_over_the_smallest_number():
    """Rounded before the loss scale, gradients of 1e-8 would be zero for good."""
    hidden, weight, targets = inputs((64, 300, 16), torch.float16, ignored=0.0)
    scale = 2.0**16

    def scaled(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets) * (1e-4 * scale)

    def expected(hidden, weight, targets):
        return reference(hidden, weight, targets) * (1e-4 * scale)

    assert_close_to_float64(scaled, expected, lambda: [hidden, weight, targets])


def test_under_autocast_it_is_linear_and_cross_entropy():
    hidden, weight, targets = inputs((60, 150, 32), torch.float32)

    def composition(hidden, weight, targets):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def results(function):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(hidden, weight, targets)
        return [loss, *gradients(loss, hidden, weight)]

    wide = in_float64([t.bfloat16() if t.is_floating_point() else t for t in (hidden, weight, targets)])
    wide = [t.requires_grad_() if t.is_floating_point() else t for t in wide]
    loss = F.cross_entropy(F.linear(wide[0], wide[1]), targets)
    ours = results(linear_cross_entropy)
    assert {t.dtype for t in ours} == {torch.float32}
    assert_within_eager_error(ours, results(composition), [loss, *gradients(loss, *wide[:2])])
    assert [t.dtype for t in results(partial(linear_cross_entropy, implementation="reference"))] == [torch.float32] * 3


def test_strided_batched_and_int32_inputs_give_the_result_of_plain_ones():
    hidden, weight, targets = (t.detach() for t in inputs((24, 50, 16), torch.bfloat16))
    expected = linear_cross_entropy(hidden, weight, targets, reduction="none")
    strided = hidden.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(linear_cross_entropy(strided, weight, targets, reduction="none"), expected)
    wide = torch.randn(50, 32, dtype=torch.bfloat16)
    wide[:, ::2] = weight
    assert torch.equal(linear_cross_entropy(hidden, wide[:, ::2], targets.int(), reduction="none"), expected)
    batched = linear_cross_entropy(hidden.view(2, 3, 4, 16), weight, targets.view(2, 3, 4), reduction="none")
    assert torch.equal(batched, expected.view(2, 3, 4))
    assert torch.equal(linear_cross_entropy(hidden[3:], weight, targets[3:], reduction="none"), expected[3:])


def test_gradients_of_batched_inputs_have_their_shape():
    hidden, weight, targets = inputs((24, 50, 16), torch.float32)
    batch = hidden.detach().view(4, 6, 16).requires_grad_()
    (expected,) = gradients(linear_cross_entropy(hidden, weight, targets), hidden)
    (found,) = gradients(linear_cross_entropy(batch, weight, targets.view(4, 6)), batch)
    assert torch.equal(found, expected.view(4, 6, 16))


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    hidden, weight, targets = inputs((300, 2000, 64), torch.bfloat16)

    def everything():
        loss = linear_cross_entropy(hidden, weight, targets, chunk=64)
        return [loss.view(1), *gradients(loss, hidden, weight)]

    assert_repeats_bitwise(everything)


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    hidden, weight, targets = inputs((25, 100, 16), torch.bfloat16)
    with torch.no_grad():
        light = linear_cross_entropy(hidden, weight, targets)
    assert not light.requires_grad
    assert torch.equal(light, linear_cross_entropy(hidden, weight, targets))
    with torch.inference_mode():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), light)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    hidden, weight, targets = inputs((20, 40, 8), dtype)
    overloads = OPERATORS["linear_cross_entropy"].overloads
    check_operator(
        overloads["default"],
        [
            (hidden, weight, targets, IGNORED, 1, 0.0, 0.0, 0, True, True),
            (hidden, weight, targets, IGNORED, 0, 2.0, 0.1, 8, False, False),
        ],
    )
    plain = [hidden.detach(), weight.detach(), targets]
    check_operator(overloads["inference"], [(*plain, IGNORED, 2, 0.0, 0.0, 0, False, False)])
    check_operator(
        OPERATORS["linear_cross_entropy_backward"].overloads["default"],
        [
            (torch.rand(20), *plain, IGNORED, 0, 0.0, 0.0, 8, True, True),
            (torch.rand(()), *plain, IGNORED, 1, 0.0, 0.0, 0, True, False),
        ],
    )
    check_operator(
        OPERATORS["linear_cross_entropy_scale"].overloads["default"],
        [(plain[0].clone(), plain[1].clone(), torch.tensor(2.0))],
    )


def test_compiles_once_with_gradients_and_dynamic_rows():
    calls = [inputs((rows, 64, 16), torch.bfloat16) for rows in (8, 24, 40)]

    def called(hidden, weight, targets):  # dynamic=True would first try a float taken from the defaults as a symbol
        return linear_cross_entropy(hidden, weight, targets, z_loss=0.0)

    assert_compiles_once(called, calls[:1] * 2)
    assert_compiles_once(called, calls, backend="aot_eager", dynamic=True)

    hidden, weight, targets = calls[0]
    for reduction in ("mean", "none"):
        loss = partial(linear_cross_entropy, reduction=reduction)
        compiled = torch.compile(loss, fullgraph=True)
        expected = gradients(loss(hidden, weight, targets).sum() * 3, hidden, weight)
        result = compiled(hidden, weight, targets).sum() * 3
        for _ in range(2):  # the second backward must not find what the first one scaled
            for found, wanted in zip(
                torch.autograd.grad(result, (hidden, weight), retain_graph=True), expected, strict=True
            ):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("target", [-1, 30, 2**40])
def test_a_target_out_of_range_is_named(target):
    hidden, weight, targets = inputs((20, 30, 8), torch.float32)
    targets[7], targets[9] = target, target
    with pytest.raises(
        RuntimeError, match=rf"targets\[7\] = {target} is out of range \(0 to 29, or ignore_index -100\)"
    ):
        linear_cross_entropy(hidden, weight, targets)
    with debug_checks(), pytest.raises(ValueError, match=rf"targets\[7\] = {target} is out of range"):
        linear_cross_entropy(hidden, weight, targets)
    targets[:] = -1
    with debug_checks():
        assert linear_cross_entropy(hidden, weight, targets, ignore_index=-1) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 8, dtype=torch.float64)}, "does not support"),
        ({"weight": torch.zeros(9, 8, dtype=torch.bfloat16)}, "weight has dtype .* autocast"),
        ({"weight": torch.zeros(9, 7)}, r"hidden \[4, 8\] must be \[..., H\] and weight \[9, 7\]"),
        ({"weight": torch.zeros(9)}, r"weight \[9\]"),
        ({"weight": torch.zeros(0, 8)}, r"weight \[0, 8\] is empty"),
        ({"hidden": torch.zeros(8), "targets": torch.zeros((), dtype=torch.long)}, r"hidden \[8\] must be"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets \[3\] must be \[4\]"),
        ({"targets": torch.zeros(4)}, "targets has dtype torch.float32"),
        ({"weight": torch.zeros(9, 8, device="meta")}, "weight is on meta"),
        ({"targets": torch.zeros(4, dtype=torch.long, device="meta")}, "targets is on meta"),
        ({"reduction": "max"}, "reduction 'max' is unknown"),
        ({"softcap": 0.0}, "softcap 0.0 must be positive"),
        ({"z_loss": -1.0}, "z_loss -1.0 must be zero or positive"),
        ({"chunk": 0}, "chunk 0 must be at least one row"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "cuda"}, "cannot run on cpu"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(9, 8), "targets": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})


def test_the_operator_itself_refuses_what_would_read_out_of_bounds():
    operator = OPERATORS["linear_cross_entropy"].overloads["inference"]
    options = (IGNORED, 1, 0.0, 0.0, 0, False, False)
    targets = torch.zeros(4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="do not fit"):
        operator(torch.zeros(4, 8), torch.zeros(9, 7), targets, *options)
    with pytest.raises(RuntimeError, match="do not fit"):
        operator(torch.zeros(4, 8), torch.zeros(9, 8), targets[:3], *options)
    with pytest.raises(RuntimeError, match="same dtype"):
        operator(torch.zeros(4, 8), torch.zeros(9, 8).half(), targets, *options)
    with pytest.raises(RuntimeError, match="gradient of the loss"):
        OPERATORS["linear_cross_entropy_backward"].overloads["default"](
            torch.zeros(3), torch.zeros(4, 8), torch.zeros(9, 8), targets, IGNORED, 0, 0.0, 0.0, 0, True, True
        )


def test_the_module_takes_a_weight_or_a_head():
    hidden, weight, targets = inputs((20, 30, 8), torch.float32)
    module = LinearCrossEntropyLoss(reduction="sum", softcap=3.0, z_loss=0.1, chunk=4)
    head = torch.nn.Linear(8, 30, bias=False)
    head.weight = torch.nn.Parameter(weight.detach())
    expected = linear_cross_entropy(hidden, weight, targets, reduction="sum", softcap=3.0, z_loss=0.1, chunk=4)
    assert torch.equal(module(hidden, weight, targets), expected)
    loss = module(hidden, head, targets)
    assert torch.equal(loss, expected)
    loss.backward()
    assert head.weight.grad is not None
    with pytest.raises(ValueError, match="has a bias"):
        module(hidden, torch.nn.Linear(8, 30), targets)
    assert "softcap=3.0" in repr(module)
