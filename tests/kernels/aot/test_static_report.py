"""Every GPU kernel that ships, compiled ahead of time: no spills, 16-byte accesses, no worse than recorded."""

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

from dreamkernels import libraries
from dreamkernels.devices import ARCHITECTURES, load_device
from dreamkernels.report import compare_with_baseline, load_baseline
from dreamkernels.report.kernels import (
    occupancy,
    report_cuda_kernels,
    report_kernels,
    report_triton_kernel,
    shipped_kernels,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here; run without TRITON_INTERPRET", allow_module_level=True)

SHIPPED = [(architecture, kernel) for architecture in ARCHITECTURES for kernel in shipped_kernels(architecture)]


@pytest.mark.parametrize(("architecture", "shipped"), SHIPPED, ids=lambda value: getattr(value, "name", value))
def test_triton_kernel_has_no_spills_and_is_no_worse_than_recorded(architecture, shipped):
    row = report_triton_kernel(shipped, architecture)
    assert compare_with_baseline(row, load_baseline(architecture)) == []
    assert row.blocks_per_sm >= 1
    # A statistics kernel reads a few sums per chunk, those of the channels of one group: 10 floats begin anywhere.
    assert row.global_accesses.get("load 16 B", 0) > 0 or "statistics" in shipped.kernel.__name__


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_have_no_spills_and_are_no_worse_than_recorded(architecture):
    path = libraries.LOADED["_cuda"].path
    if path is None:
        pytest.skip("the CUDA C++ library was not built (no nvcc)")
    rows = report_cuda_kernels(path, architecture)
    assert {row.name.partition("<")[0] for row in rows} == {
        "append_kv",
        "combine_splits",
        "cross_conditioning_forward",
        "decode_attention",
        "rms_norm_forward",
        "splice_rows",
    }
    baseline = load_baseline(architecture)
    assert [problem for row in rows for problem in compare_with_baseline(row, baseline)] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_kernels_read_and_write_each_byte_once(architecture):
    """Bytes per program, from the machine code, equal the declared minimum: x read, y written, and the weight."""
    for shipped in shipped_kernels(architecture):
        if shipped.operator != "rms_norm" or shipped.constants["BLOCK"] < 1024 or "ROWS" not in shipped.constants:
            continue
        row = report_triton_kernel(shipped, architecture)
        tile = shipped.constants["ROWS"] * shipped.constants["BLOCK"] * shipped.dtype.itemsize
        per_instruction = 16 * 32 * shipped.num_warps
        assert row.global_accesses["store 16 B"] * per_instruction == tile
        weight = shipped.constants["BLOCK"] * shipped.dtype.itemsize
        assert row.global_accesses["load 16 B"] * per_instruction == tile + max(weight, per_instruction)


def test_every_recorded_kernel_still_ships():
    for architecture in ARCHITECTURES:
        recorded = {name for name in load_baseline(architecture) if name.startswith("triton ")}
        assert recorded == {f"triton {kernel.name}" for kernel in shipped_kernels(architecture)}


def test_a_worse_kernel_is_reported():
    _, shipped = SHIPPED[0]
    row = report_triton_kernel(shipped, "sm_80")
    baseline = load_baseline("sm_80")
    worse = {
        "spills: 8 B": {"spill_bytes": 8},
        "local-memory": {"local_memory_instructions": 3},
        "registers, recorded": {"registers": 2 * row.registers},
        "blocks per multiprocessor": {"blocks_per_sm": row.blocks_per_sm - 1},
        "lost its load 16 B": {"global_accesses": {"load 4 B": 8, "store 16 B": 4}},
        "no recorded baseline": {"name": "unknown"},
    }
    for message, change in worse.items():
        problems = compare_with_baseline(dataclasses.replace(row, **change), baseline)
        assert len(problems) == 1
        assert message in problems[0]


def test_occupancy_matches_hand_calculations():
    # 128 registers x 512 threads fill the register file; 40 registers are allocated as 40 x 32 = 1280 per warp.
    assert occupancy("sm_80", registers=128, shared_bytes=0, warps=16) == (1, 0.25, "registers")
    assert occupancy("sm_80", registers=40, shared_bytes=0, warps=4) == (12, 0.75, "registers")
    assert occupancy("sm_80", registers=32, shared_bytes=0, warps=4) == (16, 1.0, "registers")
    assert occupancy("sm_80", registers=32, shared_bytes=80 * 1024, warps=4) == (2, 0.125, "shared memory")
    assert occupancy("sm_80", registers=32, shared_bytes=164 * 1024, warps=4)[0] == 0


def test_launch_parameters_say_where_they_come_from():
    for architecture in ARCHITECTURES:
        device = load_device(architecture)
        assert "measured" in device.launch_provenance
        for kernel, entries in device.launch.items():
            widths = [entry["max_width"] for entry in entries]
            assert widths == sorted(widths), kernel


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        report_kernels("sm_80")
