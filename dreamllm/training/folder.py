"""The folder of a run: whose configuration it holds, and which stages are complete."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dreamllm.training.errors import ConfigurationChangedError
from dreamllm.training.files import write_json

_PACKAGES = ("dreamkernels", "torch", "transformers", "diffusers", "numpy", "Pillow", "sentencepiece")
_SHOWN = 12


def versions() -> dict[str, str]:
    """Versions of what a run's result depends on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def claim_folder(
    path: Path, configuration: dict[str, Any], free: Collection[str] = (), say: Callable[[str], None] = print
) -> None:
    """Stores `configuration` with versions in the JSON file `path`, or checks that it is the one stored there.

    Raises `ConfigurationChangedError` naming every differing field; fields whose last name is in `free` may differ. A
    difference in versions is only said.
    """
    current = json.loads(json.dumps(configuration))
    if path.is_file():
        stored = json.loads(path.read_text())
        _compare(path, stored["configuration"], current, free)
        changed = {k: (stored["versions"].get(k), v) for k, v in versions().items() if stored["versions"].get(k) != v}
        for package, (before, now) in changed.items():
            say(f"{package} was {before} when {path.parent} was begun and is {now} now; results may differ in rounding")
    write_json(path, {"configuration": current, "versions": versions()})


def _compare(path: Path, stored: dict[str, Any], current: dict[str, Any], free: Collection[str]) -> None:
    before, now = _flatten(stored), _flatten(current)
    fields = [k for k in dict.fromkeys([*before, *now]) if k.rpartition(".")[2] not in free]
    differing = [k for k in fields if before.get(k, _ABSENT) != now.get(k, _ABSENT)]
    if not differing:
        return
    shown = "\n".join(
        f"  {k}: {json.dumps(before.get(k, _ABSENT))} there, {json.dumps(now.get(k, _ABSENT))} now"
        for k in differing[:_SHOWN]
    )
    more = f"\n  and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise ConfigurationChangedError(
        f"{path.parent} holds a run with another configuration:\n{shown}{more}\n"
        "Use the same configuration to resume it, or another folder."
    )


_ABSENT = "(absent)"


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    items: list[tuple[Any, Any]]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(item.get("name", i) if isinstance(item, dict) else i, item) for i, item in enumerate(value)]
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flatten(item, f"{name}.{key}" if name else str(key))
    return flat
