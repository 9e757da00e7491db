"""`explain`: which implementation of an operator a call would run, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dreamkernels.ops import operator


@dataclass(frozen=True)
class Explanation:
    """`chosen` would run, because of `reason`; `others` says of each other implementation why it does not."""

    operator: str
    chosen: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.others), default=0)
        head = f"{self.operator} runs {self.chosen}: {self.reason}"
        return "\n".join([head, *(f"  not {name:<{width}}  {why}" for name, why in self.others.items())])


def explain(function: Callable[..., Any] | str, *arguments: Any, **options: Any) -> Explanation:
    """Says what a call of an operator would run here, without running it.

        print(dreamkernels.explain(dreamkernels.attention, q, k, v, causal=True))

    Args:
        function: a public operator such as `dreamkernels.attention`, or its name.
        arguments, options: what the operator would be called with; nothing is computed.

    Raises:
        ValueError: there is no such operator, or the call itself would raise.
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    if name not in operator.OPERATORS:
        raise ValueError(f"{name!r} is not an operator ({', '.join(sorted(operator.OPERATORS))})")
    found = operator.OPERATORS[name]
    if found.explain is not None:
        return found.explain(*arguments, **options)
    tensors = [argument for argument in (*arguments, *options.values()) if isinstance(argument, torch.Tensor)]
    if not tensors:
        raise ValueError(f"give the tensors that {name} would be called with: the choice depends on their device")
    return by_device(found, tensors[0].device.type, options.get("implementation", "auto"))


def by_device(found: operator.Operator, device_type: str, implementation: str) -> Explanation:
    """For operators whose choice depends on the device only."""
    chosen = operator.choose(found.name, implementation, device_type)
    preferred = operator.preferred_on(device_type)
    if implementation != "auto":
        reason = "it was asked for"
    elif chosen == preferred:
        reason = f"the compiled implementation on {device_type}"
    else:
        reason = f"{preferred} cannot run: {found.unavailable(preferred, device_type)}"
    others = {
        name: found.unavailable(name, device_type) or f"{chosen} comes first"
        for name in found.implementations
        if name != chosen
    }
    return Explanation(found.name, chosen, reason, others)
