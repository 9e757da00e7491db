"""swiglu on the devices of this machine: CPU at every instruction set; Triton where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from dreamkernels import swiglu, swiglu_packed
from dreamkernels.nn import SwiGLU
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.swiglu import reference
from dreamkernels.testing import (
    assert_compiles_once,
    assert_repeats_bitwise,
    check_operator,
    supported_cpu_isas,
    using_cpu_isa,
)
from tests.support.operators import DTYPES, assert_close_to_float64, dtype_name
from tests.support.swiglu import SHAPES, inputs, packed_inputs, trials, views


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_exact_as_eager(isa, dtype, shape):
    with using_cpu_isa(isa):
        assert_close_to_float64(swiglu, reference.swiglu, lambda: inputs(shape, dtype), trials(shape))
        assert_close_to_float64(
            swiglu_packed, reference.swiglu_packed, lambda: packed_inputs(shape, dtype), trials(shape)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 20000)], ids=str)
def test_gpu_is_as_exact_as_eager(dtype, shape):
    def run(gate, up):
        return swiglu(gate, up, "triton")

    def run_packed(gate_up):
        return swiglu_packed(gate_up, "triton")

    assert_close_to_float64(run, reference.swiglu, lambda: inputs(shape, dtype, "cuda"), trials(shape))
    assert_close_to_float64(
        run_packed, reference.swiglu_packed, lambda: packed_inputs(shape, dtype, "cuda"), trials(shape)
    )


@pytest.mark.parametrize("isa", supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_small_and_large_magnitudes(isa, dtype):
    with using_cpu_isa(isa):
        for scale in (1e-3, 0.1, 30.0):
            assert_close_to_float64(swiglu, reference.swiglu, lambda scale=scale: inputs((40, 100), dtype, scale=scale))


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_every_bfloat16_gate_is_rounded_once(isa):
    """Every gate below 1e30: within half a unit of the product in float64, and of what float32 arithmetic adds."""
    gate = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.abs() < 1e30)]
    up = (1 + torch.rand(gate.shape)).bfloat16()
    exact = F.silu(gate.double()) * up.double()
    with using_cpu_isa(isa):
        found = swiglu(gate, up)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    # Below -128 ln 2 = -88.7 e^-x overflows float32: the result is zero, as in eager float32, where silu is 2.6e-37.
    overflow = 88.8 * 2.0**-128 * up.double()
    allowed = exact.abs() * (half_ulp + 1e-6) + overflow
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_infinity_and_nan_propagate_as_in_eager(isa):
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, 200.0, -200.0])
    gate, up = (t.reshape(-1).contiguous() for t in torch.meshgrid(special, special, indexing="ij"))
    with using_cpu_isa(isa):
        torch.testing.assert_close(swiglu(gate, up), reference.swiglu(gate, up), equal_nan=True)


@pytest.mark.parametrize("name", list(views()))
def test_views_give_the_result_of_copies(name):
    gate, up = (x.detach().requires_grad_() for x in views()[name])
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (gate, up)]
    y, wanted = swiglu(gate, up), swiglu(*copies)
    assert y.is_contiguous()
    assert torch.equal(y, wanted)
    gradient = torch.randn(3, 4, 10).transpose(0, 1)
    found = torch.autograd.grad(y, (gate, up), gradient)
    for a, b in zip(found, torch.autograd.grad(wanted, copies, gradient.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_packed_is_swiglu_of_the_halves():
    for gate_up in (torch.randn(4, 6, 14), torch.randn(4, 6, 30)[..., 1:15], torch.randn(6, 4, 14).transpose(0, 1)):
        gate_up.requires_grad_()
        gate, up = (half.detach().requires_grad_() for half in gate_up.chunk(2, -1))
        y, wanted = swiglu_packed(gate_up), swiglu(gate, up)
        assert torch.equal(y, wanted)
        (found,) = torch.autograd.grad(y.square().sum(), gate_up)
        assert found.is_contiguous()
        assert torch.equal(found, torch.cat(torch.autograd.grad(wanted.square().sum(), (gate, up)), -1))


def test_strided_rows_are_not_copied():
    """Of all allocations during a call only the outputs remain: column halves are read where they are."""
    gate, up = torch.randn(64, 128).chunk(2, -1)
    swiglu(gate, up)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = swiglu(gate, up)
    events = profile.profiler.kineto_results.events()
    assert sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0) == y.nbytes


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_offsets_beyond_32_bits(isa):
    """Rows 2^32 elements apart, over memory of which only the rows themselves are ever touched."""
    storage = torch.empty(2**32 + 2**12, dtype=torch.bfloat16)
    small = torch.randn(2, 40).bfloat16()
    far = storage.as_strided((2, 40), (2**32, 1)).copy_(small)
    with using_cpu_isa(isa):
        assert torch.equal(swiglu(far, small), swiglu(small, small))
        assert torch.equal(swiglu_packed(far), swiglu_packed(small))
        backward = OPERATORS["swiglu_backward"].overloads["default"]
        for a, b in zip(backward(far, far, small), backward(small, small, small), strict=True):
            assert torch.equal(a, b)


def test_backward_saves_its_inputs_only():
    saved = []
    gate, up = inputs((5, 8), torch.float32)
    gate_up = packed_inputs((5, 8), torch.float32)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        kept = swiglu(gate, up), swiglu_packed(gate_up)
    assert all(y.requires_grad for y in kept)
    assert saved == [gate.data_ptr(), up.data_ptr(), gate_up.data_ptr()]


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck_against_finite_differences():
    """float32 with a coarse step; the tolerance is that of the differences, not of the kernel."""
    assert torch.autograd.gradcheck(swiglu, inputs((3, 9), torch.float32), eps=1e-2, atol=5e-3, rtol=2e-2)


def test_results_repeat_bit_for_bit_with_any_number_of_threads():
    gate, up = inputs((701, 333), torch.bfloat16)
    gate_up = packed_inputs((701, 333), torch.bfloat16)[0]
    gradient = torch.randn_like(gate)

    def everything():
        y, packed = swiglu(gate, up), swiglu_packed(gate_up)
        return [y, packed, *torch.autograd.grad([y, packed], [gate, up, gate_up], [gradient, gradient])]

    assert_repeats_bitwise(everything)


@pytest.mark.parametrize("isa", supported_cpu_isas())
def test_denormal_results_do_not_depend_on_the_number_of_threads(isa):
    """Pairs of vectors flush denormals, single ones keep them: which elements are which must not move with threads."""
    gate, up = torch.randn(300, 2 * 333).bfloat16().chunk(2, -1)
    with using_cpu_isa(isa):
        assert_repeats_bitwise(lambda: swiglu(gate, up * 1e-38))


def test_without_gradients_the_lighter_overload_gives_the_same_bits():
    gate, up = inputs((5, 100), torch.bfloat16)
    with torch.no_grad():
        light = swiglu(gate, up)
    assert not light.requires_grad
    assert torch.equal(light, swiglu(gate, up))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_registration(dtype):
    gate, up = inputs((3, 40), dtype)
    (gate_up,) = packed_inputs((3, 40), dtype)
    plain = [t.detach() for t in (gate, up)]
    strided = plain[0].t()[:20, :2], plain[1].view(-1)[:40].view(20, 2)
    check_operator(OPERATORS["swiglu"].overloads["default"], [(gate, up)])
    check_operator(OPERATORS["swiglu"].overloads["inference"], [plain, strided])
    check_operator(OPERATORS["swiglu_packed"].overloads["default"], [(gate_up,)])
    check_operator(OPERATORS["swiglu_packed"].overloads["inference"], [(gate_up.detach().t()[:, :2],)])
    check_operator(OPERATORS["swiglu_backward"].overloads["default"], [(plain[0], *plain), (strided[1], *strided)])
    check_operator(OPERATORS["swiglu_packed_backward"].overloads["default"], [(plain[0], gate_up.detach())])


def test_compiles_once_with_gradients_and_dynamic_rows():
    calls = [inputs((rows, 64), torch.bfloat16) for rows in (8, 24, 40)]
    assert_compiles_once(swiglu, calls[:1] * 2)
    assert_compiles_once(swiglu, calls, backend="aot_eager", dynamic=True)
    packed = [packed_inputs((rows, 64), torch.bfloat16) for rows in (8, 24, 40)]
    assert_compiles_once(swiglu_packed, packed, backend="aot_eager", dynamic=True)
    gate, up = calls[0]
    compiled = torch.compile(swiglu, fullgraph=True)
    wanted = torch.autograd.grad(swiglu(gate, up).float().square().sum(), [gate, up])
    found = torch.autograd.grad(compiled(gate, up).float().square().sum(), [gate, up])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(2, 8, dtype=torch.float64)}, "gate has dtype torch.float64, which swiglu does not"),
        ({"up": torch.zeros(2, 8, dtype=torch.bfloat16)}, "up .* must have the shape, dtype and device of gate"),
        ({"up": torch.zeros(8)}, r"up \[8\] .* must have the shape"),
        ({"up": torch.zeros(2, 8, device="meta")}, "up .* on meta must have"),
        ({"gate": torch.zeros(()), "up": torch.zeros(())}, "at least one dimension"),
        ({"implementation": "fast"}, "unknown"),
        ({"implementation": "cuda"}, r"no CUDA C\+\+ implementation"),
        ({"implementation": "triton"}, "cannot run on cpu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        swiglu(**{"gate": torch.zeros(2, 8), "up": torch.zeros(2, 8), **change})


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 7), r"gate_up \[2, 7\] must have an even last dimension"),
        (torch.zeros(()), "must have an even last dimension"),
        (torch.zeros(2, 8, dtype=torch.int32), "gate_up has dtype torch.int32"),
    ],
)
def test_bad_packed_arguments_are_named(gate_up, message):
    with pytest.raises(ValueError, match=message):
        swiglu_packed(gate_up)


def test_the_operators_themselves_refuse_what_would_read_out_of_bounds():
    x = torch.zeros(2, 8)
    for name, arguments, message in (
        ("swiglu", (x, x[:1]), "one shape and dtype"),
        ("swiglu", (x, x.half()), "one shape and dtype"),
        ("swiglu", (x.sum(), x.sum()), "at least one dimension"),
        ("swiglu_backward", (x[:, :4], x, x), "one shape and dtype"),
        ("swiglu_packed", (x[:, :7],), "even last dimension"),
        ("swiglu_packed_backward", (x, x), "one shape and dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPERATORS[name].overloads["default"](*arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_module_computes_and_loads_what_llama_does(bias):
    config = LlamaConfig(hidden_size=32, intermediate_size=48, mlp_bias=bias)
    theirs = LlamaMLP(config).double()
    ours = SwiGLU(32, 48, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=1e-4, atol=1e-6)
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    ours(x.bfloat16()).float().sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
