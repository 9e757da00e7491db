"""The emulator itself: a kernel that is right passes under every schedule, and each mistake in it is caught."""

import functools
import re

import pytest
import torch

from tests.cuda_emulator.emulation import (
    HERE,
    SEEDS,
    EmulatedLibrary,
    MisuseError,
    RaceChecked,
    guarded,
    needs_compiler,
    needs_race_checker,
)

pytestmark = needs_compiler

MISTAKES = re.search(r"enum Mistake \{(.*?)\}", (HERE / "self_test.cuh").read_text(), re.DOTALL).group(1)
MISTAKES = {name: number for number, name in enumerate(re.findall(r"\w+", MISTAKES))}

# What the emulator says of a mistake, whatever the seed.
LINE = r"self_test.cuh:\d+"
THREAD = rf"in block \(\d, 0, 0\), thread \d+, at {LINE}"
MESSAGES = {
    "lane_skips_collective": rf"different collectives|deadlock.*wait at ldmatrix \({LINE}\)",
    "warp_skips_barrier": rf"divergent barrier in block .*: threads 0-31 wait at __syncthreads \({LINE}\)",
    "misaligned_copy": rf"cp.async: address not aligned to 16 bytes {THREAD}",
    "misaligned_pack": rf"load_pack: address not aligned to 8 bytes {THREAD}",
    "copy_out_of_shared_memory": rf"cp.async: out of shared memory \(byte \d+ of 1536\) {THREAD}",
    "write_past_dynamic_shared_memory": r"access past the end of dynamic shared memory in block .*, thread 3, after",
    "write_past_static_shared_array": r"a write past the end of a static shared array in block \(\d, 0, 0\)",
    "shuffle_from_lane_outside_mask": rf"shuffle from a lane that the mask does not name {THREAD}",
    "lane_exits_before_collective": r"a lane (that others wait for|named in the mask) has exited .*threads 7-7 have",
    "invalid_global_address": r"an access to an invalid address in block \(\d, 0, 0\), thread \d+",
}
# Mistakes that give a wrong result under at least one schedule, and that the race checker names.
UNORDERED = (
    "missing_barrier_before_use",
    "missing_barrier_after_use",
    "wait_for_too_few_groups",
    "unordered_warp_exchange",
    "blocks_write_the_same_row",
)


@functools.cache
def library(*flags):
    return EmulatedLibrary("self_test.cpp", flags)


@functools.cache
def race_checked():
    return RaceChecked("self_test.cpp")


def run(mistake="none", seed=0, dtype=torch.bfloat16, emulator=None):
    """The rows' sums and their float64 truth."""
    blocks, tiles = 3, 4
    a, b = torch.randn(blocks, 16, 16 * tiles).to(dtype), torch.randn(16 * tiles, 8).to(dtype)
    out = torch.full((blocks, 16), torch.nan)
    half = int(dtype == torch.float16)
    counters = (emulator or library())("row_sums", half, a, b, out, blocks, tiles, MISTAKES[mistake], seed=seed)
    return out, (a.double() @ b.double()).sum(-1), counters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_correct_kernel_passes_under_every_schedule(seed, dtype):
    out, expected, counters = run(seed=seed, dtype=dtype)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert (counters.mma, counters.ldmatrix, counters.barriers) == (3 * 4, 3 * 4 * 2, 3 * (2 * 4 + 1))
    # Rows of A are 32 bytes apart: 8 of them fall into 4 groups of banks, twice. Rows of B are 16 bytes apart.
    assert counters.ldmatrix_wavefronts == 3 * 4 * (4 * 2 + 2 * 1)
    assert counters.copies == 3 * 4 * 48


def test_a_schedule_repeats():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(run("missing_barrier_before_use", seed=2)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mistake", MESSAGES)
@pytest.mark.parametrize("seed", SEEDS)
def test_misuse_is_named_with_block_thread_and_line(mistake, seed):
    with pytest.raises(MisuseError, match=MESSAGES[mistake]):
        run(mistake, seed)
    run()  # and the emulator goes on


@pytest.mark.parametrize("mistake", UNORDERED)
def test_a_missing_order_gives_wrong_results_under_some_schedule(mistake):
    wrong = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        out, expected, _ = run(mistake, seed)
        wrong.append(not torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-4))
    assert any(wrong)


def test_every_mistake_is_tested():
    assert set(MISTAKES) == {"none", *MESSAGES, *UNORDERED}


@needs_race_checker
@pytest.mark.parametrize("seed", SEEDS)
def test_the_race_checker_finds_nothing_in_a_correct_kernel(seed):
    assert race_checked()(MISTAKES["none"], seed) == []


@needs_race_checker
@pytest.mark.parametrize("mistake", UNORDERED)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_the_race_checker_names_a_missing_order(mistake, seed):
    races = race_checked()(MISTAKES[mistake], seed)
    assert races
    for race in races:
        assert re.fullmatch(r"(Read|Write) at self_test.cuh:\d+, Previous (read|write) at self_test.cuh:\d+", race)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_ucontext_switches_as_the_assembly_does(seed):
    emulator = library("-DEMULATOR_UCONTEXT")
    torch.manual_seed(1)
    expected = run(seed=seed)[0]
    torch.manual_seed(1)
    assert torch.equal(run(seed=seed, emulator=emulator)[0], expected)
    with pytest.raises(MisuseError, match=MESSAGES["invalid_global_address"]):
        run("invalid_global_address", seed, emulator=emulator)


def test_guarded_tensors_are_copies_that_end_at_the_guard():
    tensor = torch.randn(3, 5)
    copy = guarded(tensor)
    assert torch.equal(copy, tensor)
    assert (copy.data_ptr() + copy.numel() * 4) % 4096 == 0
    with pytest.raises(MisuseError, match="an access to an invalid address"):
        library()("row_sums", 0, guarded(torch.zeros(16, 16).bfloat16()), torch.zeros(64, 8), torch.zeros(16), 1, 2, 0)
