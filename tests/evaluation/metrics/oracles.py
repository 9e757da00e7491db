"""Other programs' metric functions, loaded from their files so that their other dependencies are not needed."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def module_file(package: str, file: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0]) / file


def load_file(package: str, file: str) -> ModuleType:
    path = module_file(package, file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_of(package: str, file: str, *names: str, **given) -> dict:
    """Only the named functions and classes of a file, without its imports and decorators; they see `given`."""
    path = module_file(package, file)
    tree = ast.parse(path.read_text())
    body = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names]
    for node in body:
        node.decorator_list = []
    space = dict(given)
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space
