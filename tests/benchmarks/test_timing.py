"""Times are what the clock or the GPU's events say, and on a GPU the host is ahead of what is timed."""

import time

import pytest
import torch

from benchmarks import timing
from benchmarks.harness import Case, measure
from benchmarks.timing import CYCLES_PER_US, CudaTimer, Times, matmul_gflops, timer_for


class FakeGpu:
    """A GPU that runs what the host has queued, in order, in virtual microseconds."""

    def __init__(self, monkeypatch, l2_bytes=2**20):
        self.host = self.idle_at = 0.0
        self.log = []
        self.properties = type("Properties", (), {"L2_cache_size": l2_bytes})
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.at = max(gpu.host, gpu.idle_at)

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end):
                assert gpu.host >= end.at, "read before it happened"
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self.properties)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e6)

    def synchronize(self):
        self.host = max(self.host, self.idle_at)

    def queue(self, microseconds):
        self.idle_at = max(self.host, self.idle_at) + microseconds

    def spin(self, cycles):
        self.log.append("spin")
        self.queue(cycles / CYCLES_PER_US)

    def kernels(self, launches, launch_us, kernel_us):
        """A call of several kernels, each launched before it runs."""

        def call(*inputs):
            self.log.append("call")
            for _ in range(launches):
                self.host += launch_us
                self.queue(kernel_us)

        return call


def test_launches_are_hidden_behind_a_spinning_kernel(monkeypatch):
    """Ten kernels of 2 us that take 10 us each to launch: 20 us of GPU time, although the host needs 100."""
    gpu = FakeGpu(monkeypatch)
    timer, call = CudaTimer(), gpu.kernels(10, launch_us=10, kernel_us=2)
    timer.prepare("ours", call, ())
    gpu.log.clear()
    assert timer.time("ours", call, ()) == pytest.approx(20)
    assert gpu.log == ["spin", "event", "call", "event"]


def test_time_of_long_kernels_is_their_own(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    assert CudaTimer().time("ours", gpu.kernels(3, launch_us=1, kernel_us=1000), ()) == pytest.approx(3000)


def test_compiling_in_the_first_call_does_not_lengthen_the_spin(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer, fast = CudaTimer(), gpu.kernels(1, launch_us=5, kernel_us=1)
    timer.prepare("ours", gpu.kernels(1, launch_us=5e6, kernel_us=1), ())
    timer.prepare("ours", fast, ())
    assert timer.spin_cycles("ours") == pytest.approx(30 * CYCLES_PER_US, rel=1e-3)


def test_waiting_inside_a_call_counts(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    launch = gpu.kernels(1, launch_us=10, kernel_us=2)

    def reads_back():
        launch()
        gpu.synchronize()
        launch()

    assert CudaTimer().time("peer", reads_back, ()) == pytest.approx(2 + 10 + 2)


def test_input_sets_exceed_the_last_level_cache(monkeypatch):
    FakeGpu(monkeypatch, l2_bytes=50 * 2**20)
    assert CudaTimer().cold_bytes(2**20) == 200 * 2**20
    assert CudaTimer().cold_bytes(2**30) == 2**30
    assert timer_for("cpu").cold_bytes(7) == 7


def test_cold_rounds_take_turns_over_the_input_sets(monkeypatch):
    seen = {"ours": [], "eager": []}
    made = iter(range(100))

    def case(cold_bytes):
        def recording(name):
            def call(x):
                seen[name].append(int(x[0]))
                return torch.zeros(1)

            return call

        contenders = {name: recording(name) for name in seen}
        make = lambda: [torch.full((256,), float(next(made)))]  # noqa: E731
        return Case("x", "", make, contenders, 1024, 0, 0.0, cold_bytes=cold_bytes)

    measure(case(cold_bytes=5 * 1024), rounds=8)
    turns = {name: calls[-8:] for name, calls in seen.items()}
    assert len(set(turns["ours"])) == 6
    assert all(a != b for a, b in zip(turns["ours"], turns["ours"][1:], strict=False))
    assert all(a != b for a, b in zip(turns["ours"], turns["eager"], strict=True)), "the second would find it cached"


def test_quantiles_of_the_rounds():
    times = Times.of([float(value) for value in range(100, 0, -1)])
    assert (times.minimum, times.median, times.rounds) == (1, 50.5, 100)
    assert times.low == pytest.approx(10.9)
    assert times.high == pytest.approx(90.1)
    assert Times.of([3.0]) == Times(3.0, 3.0, 3.0, 3.0, 1)


def test_cpu_time_is_the_clocks():
    elapsed = timer_for("cpu").time("x", time.sleep, (0.01,))
    assert elapsed >= 10_000


def test_measured_limits_are_operations_over_time(monkeypatch):
    monkeypatch.setattr(timing.CpuTimer, "time", lambda self, name, call, inputs: 2.0)  # microseconds
    assert matmul_gflops("cpu", size=100) == pytest.approx({"float32": 1000.0, "bfloat16": 1000.0})
