"""Matrix products run on tensor cores of the right kind, and the model that predicts an order counts as by hand."""

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

import torch

from dreamkernels.devices import ARCHITECTURES
from dreamkernels.report import compare_with_baseline, load_baseline
from dreamkernels.report.kernels import report_triton_kernel, shipped_kernels
from dreamkernels.report.machine_code import read_cubin
from dreamkernels.report.scoreboard import Instruction, main_loop, predict, read_instructions, simulate
from dreamkernels.report.text import as_prediction

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here; run without TRITON_INTERPRET", allow_module_level=True)

KIND = {"sm_80": "HMMA", "sm_90": "HGMMA"}
PRODUCTS = {"forward_kernel": 2, "keys_kernel": 4, "queries_kernel": 3}  # of BLOCK_Q x BLOCK_K x D each
FREE, NOTHING = 7, 0  # of a scoreboard: none is set, none is waited for


def attention_kernels(architecture):
    for shipped in shipped_kernels(architecture):
        if shipped.operator.startswith("attention") and shipped.kernel.__name__ in PRODUCTS:
            yield shipped


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_attention_kernel_uses_the_tensor_cores_of_its_architecture(architecture):
    """From the recorded report, which test_static_report.py holds the compiler to."""
    baseline = load_baseline(architecture)
    for shipped in attention_kernels(architecture):
        recorded = baseline[f"triton {shipped.name}"].get("tensor_core", {})
        if shipped.dtype == torch.float32:
            assert recorded == {}  # exact float32 products; tensor cores would round them to tf32
        else:
            assert set(recorded) == {KIND[architecture]}, shipped.name


def one_of(architecture, name, head_dim=64):
    return next(
        shipped
        for shipped in attention_kernels(architecture)
        if shipped.kernel.__name__ == name and shipped.width == head_dim and shipped.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_loop_holds_exactly_the_products_of_one_block(architecture, name):
    from dreamkernels.report.kernels import compile_triton

    shipped = one_of(architecture, name)
    (code,) = read_cubin(compile_triton(shipped, architecture).asm["cubin"])
    body = main_loop(*read_instructions(code.listing))
    block = shipped.constants["BLOCK_Q"] * shipped.constants["BLOCK_K"] * 64
    assert sum(i.multiply_adds for i in body) * shipped.num_warps == PRODUCTS[name] * block


def test_a_lost_kind_of_product_is_a_regression():
    shipped = one_of("sm_80", "forward_kernel")
    row = report_triton_kernel(shipped, "sm_80", predict=True)
    (problem,) = compare_with_baseline(dataclasses.replace(row, tensor_core={}), load_baseline("sm_80"))
    assert "lost its HMMA instructions" in problem
    text = as_prediction("sm_80", [row])
    assert "UNVALIDATED" in text
    assert shipped.name in text
    assert "no kernel" in as_prediction("sm_80", [dataclasses.replace(row, prediction=None)])


def instruction(opcode, stall=1, sets=FREE, waits=NOTHING):
    return Instruction(0, opcode, "R0, R1, R2", stall | sets << 5 | FREE << 8 | waits << 11)


def test_multiply_adds_by_instruction():
    assert instruction("HMMA.16816.F32.BF16").multiply_adds == 16 * 8 * 16
    assert Instruction(0, "HGMMA.64", "x128x16.F32.BF16 R24, R24", 0).multiply_adds == 64 * 128 * 16 // 4
    assert instruction("FFMA").multiply_adds == 0


def test_the_model_counts_as_by_hand():
    # Four products of 8 cycles each fill the pipe of sm_80; half as many instructions of 2048 take half as long.
    product = instruction("HMMA.16816.F32.BF16")
    assert simulate([product] * 4, "sm_80", warps=1) == (pytest.approx(32), pytest.approx(1))
    assert simulate([product] * 2, "sm_80", warps=2) == (pytest.approx(16), pytest.approx(1))
    # A stall of 10 cycles of a lone warp; a second warp fills it.
    waiting = [instruction("NOP", stall=10)]
    assert simulate(waiting, "sm_80", warps=1)[0] == pytest.approx(10)
    assert simulate(waiting, "sm_80", warps=2)[0] == pytest.approx(5, rel=0.02)
    # An exponential (8 + 22 cycles) that the next instruction waits for.
    chain = [instruction("MUFU.EX2", sets=0), instruction("FADD", waits=1)]
    assert simulate(chain, "sm_80", warps=1)[0] == pytest.approx(31, rel=0.01)


def test_no_loop_no_prediction():
    assert predict("", "sm_80", warps=4, blocks_per_sm=2) is None
