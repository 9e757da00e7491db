"""Peers are called as their libraries want it, are checked like any contender, and are never silently absent."""

import importlib.util
import sys

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import check_contenders
from benchmarks.ops import bench_attention, bench_condition_kv
from benchmarks.running import chosen
from tests.support import fake_peers

TINY = {
    "rms_norm": ((6, 32),),
    "layer_norm": ((6, 32),),
    "swiglu": ((6, 32),),
    "geglu": ((6, 64),),
    "rotary": ((2, 4, 2, 7, 16),),
    "linear_cross_entropy": (12, 16, 40),
    "decode_attention": ((2, 3, 8, 2, 20), (1, 1, 32, 32, 9)),
    "group_norm_silu": ((2, 32, 4, 3),),
    "diffusion_loss": ((3, 4, 8, 8),),
    "cross_conditioning": ((2, 16, 2),),
    "attention": (
        bench_attention.Shape("causal", 2, 16, 9, 9, batch=2),
        bench_attention.Shape("a last query meets the last key", 2, 16, 4, 9),
        bench_attention.Shape("full", 2, 16, 5, 9, causal=False),
        bench_attention.Shape("packed", 2, 16, documents=(3, 8, 1)),
        bench_attention.Shape("prefix", 2, 16, 4, 9, constant_keys=5),
    ),
}
EXPECTED = {
    "rms_norm": {"liger_rms_norm"},
    "layer_norm": {"liger_layer_norm"},
    "swiglu": {"liger_swiglu"},
    "geglu": {"liger_geglu"},
    "rotary": {"liger_rope", "apply_rotary_emb"},
    "linear_cross_entropy": {"liger_fused_linear_cross_entropy", "cut_linear_cross_entropy"},
    "decode_attention": {"flash_attn_with_kvcache"},
    "group_norm_silu": {"liger_group_norm"},
    "diffusion_loss": set(),
    "cross_conditioning": {"flash_attn_func", "memory_efficient_attention"},
    "attention": {"flash_attn_func", "flash_attn_varlen_func", "memory_efficient_attention"},
}


@pytest.fixture
def cases(monkeypatch):
    """The tiny cases of a benchmark, on the CPU as if its peers ran there."""

    def make(name):
        module = chosen([name])[name]
        monkeypatch.setitem(module.SHAPES, "small", TINY[name])
        monkeypatch.setattr(peers, "ANYWHERE", tuple(peers.MODULES))
        torch.manual_seed(0)
        return [case.without_compiled() for case in module.cases("cpu", "small")]

    return make


@pytest.mark.parametrize("name", TINY)
def test_peers_compute_what_ours_computes(name, cases, monkeypatch):
    called = set()
    fake_peers.install(monkeypatch, called)
    for case in cases(name):
        failures = check_contenders(case)
        # Known differences: flash-attn's dtypes, and Liger-Kernel's gelu, which is the approximation by tanh.
        if "float32" in case.label:
            assert failures.pop(peers.FLASH, "does not take float32") == "does not take float32"
        if name == "geglu" and "float32" in case.label:
            assert failures.pop(peers.LIGER).startswith("its result differs by")
        assert failures == {}, case.label
    assert called == EXPECTED[name]


def test_a_peer_that_computes_something_else_is_not_timed(cases, monkeypatch):
    fake_peers.install(monkeypatch, set())
    monkeypatch.setattr(sys.modules["liger_kernel.transformers.functional"], "liger_swiglu", lambda a, b: a * b)
    for case in cases("swiglu"):
        assert check_contenders(case)[peers.LIGER].startswith("its result differs by")


def test_what_a_peer_raises_is_its_row(cases, monkeypatch):
    def broken(a, b):
        raise RuntimeError("CUDA error: no kernel image\nsecond line")

    fake_peers.install(monkeypatch, set())
    monkeypatch.setattr(sys.modules["liger_kernel.transformers.functional"], "liger_swiglu", broken)
    assert check_contenders(cases("swiglu")[0])[peers.LIGER] == "RuntimeError: CUDA error: no kernel image"


@pytest.mark.parametrize("library", [peers.LIGER, peers.CUT, peers.FLASH, peers.XFORMERS])
def test_reasons(library, monkeypatch):
    def load():
        raise ImportError("libcudart.so.12: cannot open\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.peer(library, "cuda", load) == "not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert peers.peer(library, "cpu", load) == "needs a GPU"
    assert peers.peer(library, "cuda", load) == "cannot be imported: ImportError: libcudart.so.12: cannot open"
    assert peers.wrapped("not installed", lambda call: call) == "not installed"


@pytest.mark.parametrize("name", TINY)
def test_no_peer_is_silently_absent(name, cases):
    """Without the libraries every case still names them."""
    module = chosen([name])[name]
    mentioned = {peer for case in cases(name) for peer in case.peers}
    source = module.__loader__.get_source(module.__name__)
    named = {value for key, value in vars(peers).items() if f"peers.{key}" in source and value in peers.MODULES}
    assert mentioned == named
    assert mentioned


def test_diffusers_own_modules_run_where_it_is_installed():
    assert not isinstance(peers.diffusers_geglu("cpu"), str)
    assert peers.liger_swiglu("cpu") in ("not installed", "needs a GPU")
    assert set(bench_condition_kv.SHAPES) == {"small", "working"}
