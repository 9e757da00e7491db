"""What oneDNN keeps of the shapes that a server meets, by oneDNN's own log and by what stays allocated."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

import dreamllm.demo.command
import dreamllm.server.command
from dreamllm.server import memory
from dreamllm.server.memory import KEPT_DESCRIPTIONS, KEPT_PRIMITIVES

BOUNDS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRELUDE = """
import runpy, sys
import torch
runpy.run_path(sys.argv[1])["bound_onednn_caches"]()  # without the rest of the package, which takes seconds
weight = torch.randn(32, 16)
def multiply(*rows):
    for count in rows:
        torch.ops.mkldnn._linear_pointwise(torch.randn(count, 16), weight, None, "none", [], "")
"""
PRIMITIVES = f"""
multiply(*range(2, {KEPT_PRIMITIVES + 12}))
print("again", flush=True)
multiply({KEPT_PRIMITIVES + 11})
print("again", flush=True)
multiply(2)
"""
DESCRIPTIONS = """
import ctypes
class Heap(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]
mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Heap
def used():
    heap = mallinfo()
    return heap.field4 + heap.field7  # mapped, and of the arenas
for first, last in ((2, 34), (34, 100), (100, 228)):
    before = used()
    multiply(*range(first, last))
    print(used() - before)
"""

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


def output_of(program, **environment):
    """What a process of its own prints, whose environment says nothing else of oneDNN."""
    inherited = {name: value for name, value in os.environ.items() if name not in BOUNDS}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", PRELUDE + program, memory.__file__]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True).stdout


@needs_onednn
def test_the_latest_primitives_alone_are_kept():
    first, latest, oldest = output_of(PRIMITIVES, ONEDNN_VERBOSE="profile_create").split("again")
    assert first.count("create:cache_miss,cpu,inner_product") == KEPT_PRIMITIVES + 10
    assert "create:cache_hit,cpu,inner_product" in latest
    assert "create:cache_miss,cpu,inner_product" in oldest


@needs_onednn
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say what is allocated")
def test_the_latest_descriptions_alone_are_kept():
    # Without primitives only descriptions stay allocated: those of 32 shapes, of more than are kept, of 128 others.
    few, _, more = map(int, output_of(DESCRIPTIONS, ONEDNN_PRIMITIVE_CACHE_CAPACITY="0").split())
    assert KEPT_DESCRIPTIONS < 98
    assert more < few / 4


@pytest.mark.parametrize(
    ("module", "command"), [(dreamllm.server.command, "serve"), (dreamllm.demo.command, "demo")], ids=["serve", "demo"]
)
def test_servers_set_the_bounds_before_they_load_and_keep_what_the_environment_says(
    module, command, monkeypatch, tmp_path
):
    for name in BOUNDS:
        monkeypatch.setenv(name, "")  # so that what follows is undone
        monkeypatch.delenv(name)
    found = []

    def load(*_, **__):
        found.append(tuple(os.environ.get(name) for name in BOUNDS))
        raise InterruptedError

    monkeypatch.setattr(module, "load", load)
    with pytest.raises(InterruptedError):
        getattr(module, command)(tmp_path)
    monkeypatch.setenv(BOUNDS[0], "7")
    with pytest.raises(InterruptedError):
        getattr(module, command)(tmp_path)
    assert found == [(str(KEPT_PRIMITIVES), str(KEPT_DESCRIPTIONS)), ("7", str(KEPT_DESCRIPTIONS))]
