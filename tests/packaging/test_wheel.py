"""The wheel: what it contains, and that it runs where only torch and NumPy are, with and without a compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import dreamkernels

ROOT = Path(__file__).resolve().parents[2]
RUN_RMS_NORM = """
import torch, dreamkernels
x = torch.randn(4, 64).bfloat16()
y = dreamkernels.rms_norm(x, torch.ones(64).bfloat16())
assert torch.equal(y, dreamkernels.rms_norm(x, torch.ones(64).bfloat16(), implementation="reference"))
print(dreamkernels.__file__, dreamkernels.libraries.LOADED["_cpu"].loaded)
"""


def build(command: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds from a copy of the sources, so that neither the checkout nor its build folder is touched."""
    sources = where / "sources"
    sources.mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "MANIFEST.in",
        "csrc",
        "dreamkernels",
        "dreamllm",
        "README.md",
    ):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(sources)], check=True)
    for library in (sources / "dreamkernels").glob("*.so"):
        library.unlink()
    settings = {"DREAMKERNELS_BUILD_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, *command],
        cwd=sources,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def build_wheel(where: Path, **environment: str) -> tuple[Path, str]:
    done = build(["-m", "build", "--wheel", "--no-isolation", "--outdir", str(where)], where, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = where.glob("*.whl")
    return wheel, done.stdout + done.stderr


def run_alone(wheel: Path, where: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code on the contents of the wheel; -S keeps an editable installation of this checkout out of the way."""
    installed = where / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    libraries = {str(Path(module.__file__).parents[1]) for module in (torch, numpy)}
    start = f"import sys; sys.path[:0] = [{str(installed)!r}]; sys.path += {sorted(libraries)!r}\n"
    return subprocess.run(
        [sys.executable, "-S", "-W", "always", "-c", start + code],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_runs_where_only_torch_and_numpy_are(tmp_path):
    wheel, _ = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert "dreamkernels/_cpu.abi3.so" in names
    assert any(name.startswith("dreamkernels/_C.") for name in names)
    assert "dreamkernels/devices/sm_80.json" in names
    assert "dreamkernels/report/baseline_sm_90.json" in names
    assert {f"dreamllm/demo/page/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)
    done = run_alone(wheel, tmp_path, RUN_RMS_NORM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "installed" / "dreamkernels" / "__init__.py"), "True"]


def test_without_a_compiler_the_wheel_still_builds_and_says_what_is_missing(tmp_path):
    wheel, said = build_wheel(tmp_path, CXX="/nonexistent/c++")
    assert "NO C++ COMPILER FOUND" in said
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    done = run_alone(wheel, tmp_path, RUN_RMS_NORM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"
    assert done.stderr.count("MissingLibraryWarning") == 1


def test_without_torch_the_build_stops_with_one_line(tmp_path):
    # -S: no site-packages, hence no torch; setuptools and what it needs are put back by hand
    import setuptools

    packages = str(Path(setuptools.__file__).parents[1])
    hide = (
        f"import sys, importlib.util as u; sys.path.append({packages!r}); find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
        "sys.argv = ['setup.py', 'build_ext']; import runpy; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = build(["-S", "-c", hide], tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == "dreamkernels: torch is not installed; install torch first, then: pip install --no-build-isolation ."


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DREAMKERNELS_BUILD_CUDA": "yes"}, "'yes' is not supported (auto, 0 or 1)"),
        ({"DREAMKERNELS_BUILD_CUDA": "1", "NVCC": "/nonexistent/nvcc"}, "nvcc was not found"),
    ],
)
def test_cuda_settings_that_cannot_be_honoured_are_errors(tmp_path, environment, message):
    done = build(["setup.py", "build_ext"], tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_version_is_stated_once():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("dreamkernels") == dreamkernels.__version__
    except PackageNotFoundError:
        pytest.skip("running from the sources without an installation")
