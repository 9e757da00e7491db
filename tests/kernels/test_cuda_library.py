"""The CUDA C++ library: stable ABI only, loads on a CPU-only torch, says where it cannot run."""

import re
import subprocess
import sys

import pytest
import torch

from dreamkernels import libraries
from dreamkernels.ops.operator import OPERATORS, has_kernel

built = pytest.mark.skipif(not libraries.LOADED["_cuda"].loaded, reason="the CUDA C++ library was not built (no nvcc)")


def undefined_symbols(path) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    return listing.stdout.splitlines()


@built
def test_it_is_loaded_and_registers_its_operators():
    names = {name for name, operator in OPERATORS.items() if operator.cuda}
    assert names == {
        "rms_norm",
        "add_rms_norm",
        "append_kv",
        "cross_conditioning",
        "decode_attention",
        "splice_embeddings",
    }
    for name in names:
        assert has_kernel(f"dreamkernels::{name}.cuda", "CUDA")


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_it_uses_the_stable_abi_only(name):
    path = libraries.LOADED[name].path
    if path is None:
        pytest.skip(f"{name} was not built")
    symbols = undefined_symbols(path)
    torch_symbols = [line for line in symbols if re.search(r"torch|_ZN?K?2at|_ZN?K?3c10", line)]
    assert torch_symbols, "expected calls into LibTorch"
    for line in torch_symbols:
        assert re.search(r" (aoti_torch|torch)_\w+$", line), f"not part of the stable ABI: {line}"


@built
def test_the_current_stream_is_a_weak_symbol_and_cudart_is_static():
    path = libraries.LOADED["_cuda"].path
    (stream,) = [line for line in undefined_symbols(path) if "current_cuda_stream" in line]
    assert stream.split()[0] == "w"
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed


@built
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch")
def test_on_a_cpu_only_torch_it_says_so():
    operator = OPERATORS["rms_norm"].overloads["cuda"]
    with pytest.raises(NotImplementedError, match="CPU"):
        operator(torch.zeros(2, 8), torch.zeros(8), 1e-6)


def test_importing_does_not_import_triton():
    """Triton takes a while to import; a CPU-only user does not pay for it."""
    code = "import dreamkernels, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
