"""The choice between implementations, the libraries, the support matrix and the information command."""

import json
import subprocess
import sys

import pytest
import torch

import dreamkernels
from dreamkernels import information, libraries
from dreamkernels.ops import operator as operators
from dreamkernels.testing import cpu_isa, set_cpu_isa, supported_cpu_isas, using_cpu_isa


@pytest.fixture
def fresh_choices(monkeypatch):
    monkeypatch.setattr(operators, "_choices", {})


def test_every_declared_operator_has_its_kernels():
    assert libraries.LOADED["_cpu"].loaded, libraries.LOADED["_cpu"].error
    for name, operator in operators.OPERATORS.items():
        for overload in operator.overloads:
            if overload in ("default", "inference"):
                assert operators.has_kernel(operator.qualified(overload), "CPU"), f"{name}.{overload}"
            if overload != "cuda" and operator.triton:
                assert operators.has_kernel(operator.qualified(overload), "CUDA"), f"{name}.{overload}"


@pytest.mark.usefixtures("fresh_choices")
def test_auto_takes_the_compiled_kernel_and_explicit_choices_are_kept():
    assert operators.choose("rms_norm", "auto", "cpu") == "cpu"
    assert operators.choose("rms_norm", "cpu", "cpu") == "cpu"
    assert operators.choose("rms_norm", "reference", "cpu") == "reference"
    assert operators.choose("rms_norm", "auto", "cuda") == "triton"


@pytest.mark.usefixtures("fresh_choices")
def test_a_fallback_warns_once_with_operator_reason_and_cost(recwarn):
    for _ in range(3):
        assert operators.choose("rms_norm", "auto", "xpu") == "reference"
    (warning,) = recwarn.list
    assert warning.category is dreamkernels.FallbackWarning
    for part in ("rms_norm on xpu", "reference", "runs on cpu tensors only", "several times"):
        assert part in str(warning.message)


@pytest.mark.usefixtures("fresh_choices")
def test_without_triton_cuda_falls_back_loudly(monkeypatch):
    monkeypatch.setattr(operators, "triton_installed", lambda: False)
    with pytest.warns(dreamkernels.FallbackWarning, match="triton is not installed"):
        assert operators.choose("splice_embeddings", "auto", "cuda") == "reference"
    with pytest.raises(
        ValueError, match='implementation="triton" of rms_norm cannot run on cuda: triton is not installed'
    ):
        operators.choose("rms_norm", "triton", "cuda")


def test_missing_libraries_are_named_once_and_everything_still_works(tmp_path):
    """A copy of the package without its compiled parts, in a process of its own."""
    code = """
import shutil, sys, warnings, pathlib, numpy, torch
source = pathlib.Path(sys.argv[1])
copy = pathlib.Path(sys.argv[2]) / "dreamkernels"
shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
sys.path.insert(0, sys.argv[2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dreamkernels
    assert str(pathlib.Path(dreamkernels.__file__)).startswith(sys.argv[2])
    x = torch.randn(3, 8, requires_grad=True)
    y, h = dreamkernels.rms_norm(x, torch.ones(8), residual=x)
    y.sum().backward()
    dreamkernels.splice_embeddings(x, [x], torch.tensor([-1, 0, 2]))
    bins = dreamkernels.pack_sequences([3, 4, 5], 7)
    assert bins[0].tolist() == [0, 0, 1] and bins[1] == 2
missing = [str(w.message) for w in caught if w.category is dreamkernels.MissingLibraryWarning]
assert len(missing) == 1, missing
print(missing[0])
"""
    package = libraries._PACKAGE
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}\n{code}", str(package), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for part in ("dreamkernels._cpu", "dreamkernels._C", "several times slower", "C++ compiler"):
        assert part in done.stdout


def test_instruction_sets_can_be_forced_and_restored():
    before = cpu_isa()
    assert before == supported_cpu_isas()[-1]
    with using_cpu_isa("scalar"):
        assert cpu_isa() == "scalar"
    assert cpu_isa() == before
    with pytest.raises(ValueError, match="'sse9' is not available here"):
        set_cpu_isa("sse9")


def test_support_matrix_follows_the_registrations(monkeypatch):
    def row(name, implementation):
        rows = operators.support_matrix()
        return next(r for r in rows if (r["operator"], r["implementation"]) == (name, implementation))["devices"]

    assert row("rms_norm", "cpu")["cpu"]["dtypes"] == ["float32", "bfloat16", "float16"]
    assert row("rms_norm", "cpu")["cuda"]["reason"]
    monkeypatch.setattr(operators, "has_kernel", lambda name, key: False)
    assert row("rms_norm", "cpu")["cpu"]["reason"] == "the compiled CPU library is not loaded"


def test_explain_says_what_runs_and_why_not_the_others():
    x, weight = torch.ones(2, 8), torch.ones(8)
    found = dreamkernels.explain(dreamkernels.rms_norm, x, weight)
    assert found.chosen == "cpu"
    assert found.others["cuda"] == "it runs on cuda tensors only"
    assert found.others["reference"] == "cpu comes first"
    assert str(found).startswith("rms_norm runs cpu: the compiled implementation on cpu")
    asked = dreamkernels.explain("rms_norm", x, weight, implementation="reference")
    assert (asked.chosen, asked.reason) == ("reference", "it was asked for")
    with pytest.raises(ValueError, match="'softmax' is not an operator"):
        dreamkernels.explain("softmax", x)
    with pytest.raises(ValueError, match="give the tensors"):
        dreamkernels.explain("rms_norm")


def test_information_names_every_operator_and_is_valid_json():
    text = information.as_text(information.collect())
    for name in operators.OPERATORS:
        assert name in text
    done = subprocess.run(
        [sys.executable, "-m", "dreamkernels", "info", "--json"], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert {part["name"] for part in facts["libraries"]} == {"_cpu", "_cuda", "_C"}


def test_build_information_has_no_date_and_names_the_abi():
    build = libraries.build_information()
    assert build["torch_target_version"] == "0x020b000000000000"
    assert build["cpu_isas"].split(",")[0] == "scalar"
    assert set(build) == {
        "compiler",
        "flags",
        "cpu_isas",
        "torch_target_version",
        "nvcc",
        "cuda_architectures",
        "git_commit",
    }


@pytest.mark.parametrize("residual", [False, True], ids=["one output", "two outputs"])
def test_eager_and_registered_autograd_give_the_same_gradients(residual):
    """Eager calls record their gradient without crossing the dispatcher twice; compiled ones use what is registered."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32, requires_grad=True), torch.rand(32, requires_grad=True)
    inputs = (x, torch.randn(5, 32, requires_grad=True), weight) if residual else (x, weight)
    operator = operators.OPERATORS["add_rms_norm" if residual else "rms_norm"]
    eager = operators.overload_for(operator, "cpu", needs_grad=True)
    registered = operator.overloads["default"]
    assert eager is not registered
    for frozen in (None, x, weight):  # a frozen input gets no gradient from either
        wanted = [t for t in inputs if t is not frozen]
        found = []
        for call in (eager, registered):
            outputs = call(*(t.detach() if t is frozen else t for t in inputs), 1e-6)
            outputs = outputs if residual else (outputs,)
            found.append(torch.autograd.grad(sum((k + 2) * y.square().sum() for k, y in enumerate(outputs)), wanted))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
