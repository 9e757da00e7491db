"""The rules of the house that a program can check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "documents": 0,
    "model": 1,
    "data": 1,
    "training": 2,
    "inference": 2,
    "evaluation": 3,
    "inspection": 3,
    "workloads": 3,
    "server": 3,
    "demo": 4,
    "generation": 4,
    "monitoring": 4,
    "profiling": 4,
    "planning": 5,
    "recipes": 6,
    "cli": 7,
}
"""A part of dreamllm may import parts of a lower layer, and those of its own layer named in SIDEWAYS."""
SIDEWAYS = {("data", "model")}
PYTHON_FILES = [p for package in ("dreamkernels", "dreamllm") for p in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module}
    return modules


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "dreamllm").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in PYTHON_FILES if "dreamllm" in p.parts], ids=lambda p: str(p.relative_to(ROOT))
)
def test_arrows_point_one_way(path):
    part = part_of(path)
    for module in imported_modules(path):
        if not module.startswith("dreamllm."):
            continue
        other = module.split(".")[1]
        if part in LAYERS and other != part:
            allowed = LAYERS[other] < LAYERS[part] or (part, other) in SIDEWAYS
            assert allowed, f"{part} imports {other}"


@pytest.mark.parametrize(
    "path", [p for p in PYTHON_FILES if "dreamkernels" in p.parts], ids=lambda p: str(p.relative_to(ROOT))
)
def test_dreamkernels_knows_nothing_of_dreamllm(path):
    assert not [m for m in imported_modules(path) if m.split(".")[0] == "dreamllm"]


@pytest.mark.parametrize(
    "path", [p for p in PYTHON_FILES if "dreamllm" in p.parts], ids=lambda p: str(p.relative_to(ROOT))
)
def test_dreamllm_uses_only_the_public_side_of_dreamkernels(path):
    integrations = (
        "transformers",
        "transformers_attention",
        "diffusers",
        "diffusers_attention",
        "decoding",
        "paged_cache",
    )
    parts = ("ops", "nn", *(f"integrations.{name}" for name in integrations), "version", "packing", "products")
    public = {"dreamkernels", *(f"dreamkernels.{part}" for part in parts)}
    used = {m for m in imported_modules(path) if m.split(".")[0] == "dreamkernels"}
    assert used <= public


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torchvision_is_never_imported(path):
    assert not [m for m in imported_modules(path) if m.split(".")[0] == "torchvision"]
