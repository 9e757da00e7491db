"""What an integration changed in a model, what it left and why, and the way back."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_MARK = "_dreamkernels_operator"


def patched_by_us(module: nn.Module) -> bool:
    """Whether this instance runs a forward that dreamkernels put there."""
    # The function of the bound method: a wrapper around it may have copied its attributes.
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), _MARK)


@dataclass
class Report:
    """The result of `optimize`. Printing it gives a table; leaving it as a context manager undoes the replacement.

    Attributes:
        replaced: module name -> the operators that it uses now.
        left: module name -> why it keeps its own code. "" is the model itself.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _patches: dict[str, tuple[nn.Module, Any]] = field(default_factory=dict, repr=False)
    _restores: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def patch(self, name: str, module: nn.Module, forward: Callable[..., Any], operator: str) -> None:
        """Gives this instance, not its class, another forward. The signature that others inspect stays."""

        @functools.wraps(type(module).forward)
        def replacement(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        setattr(replacement, _MARK, operator)
        bound = types.MethodType(replacement, module)
        module.forward = bound  # type: ignore[method-assign]
        self._patches[name] = (module, bound)
        self.replaced[name] = operator

    def on_undo(self, restore: Callable[[], None]) -> None:
        self._restores.append(restore)

    def undo(self) -> None:
        """Gives every replaced module its own code back. A second call does nothing.

        Raises:
            RuntimeError: a module was wrapped by something else since then; undo that first. Nothing is changed.
        """
        changed = [name for name, (module, bound) in self._patches.items() if module.__dict__.get("forward") != bound]
        if changed:
            raise RuntimeError(
                f"the forward of {', '.join(map(repr, changed[:3]))} was replaced again after optimize(); "
                "undo what replaced it first"
            )
        for module, _ in self._patches.values():
            del module.forward
        for restore in reversed(self._restores):
            restore()
        self._patches.clear()
        self._restores.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = _table("replaced", self.replaced) + _table("left", self.left)
        return "\n".join(lines) if lines else "nothing replaced: no module that dreamkernels knows"


def _table(title: str, entries: dict[str, str]) -> list[str]:
    """One line per pattern of names: layers that are treated alike share a line."""
    counts: dict[tuple[str, str], int] = {}
    for name, text in entries.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) or "(model)", text)
        counts[key] = counts.get(key, 0) + 1
    width = max((len(pattern) for pattern, _ in counts), default=0)
    rows = [f"  {pattern:{width}}  {count:>4} x  {text}" for (pattern, text), count in counts.items()]
    return [f"{title}: {len(entries)}", *rows] if rows else []
