"""Which implementation of attention a call runs: by the table of the device, among those that can run the call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dreamkernels.devices import ARCHITECTURES, architecture_of, order_of_choice
from dreamkernels.ops import operator
from dreamkernels.ops.attention import external
from dreamkernels.ops.explanation import Explanation

HEAD_DIMS = (32, 64, 96, 128, 256)
WIDER = 1 << 20
MAX_TRITON_HEAD_DIM = 128  # wider tiles do not fit the registers of both architectures


class Request(NamedTuple):
    """What the choice depends on. Constants all, also where torch.compile traces with dynamic shapes."""

    device_type: str
    dtype: torch.dtype
    head_dim: int  # rounded up to one of HEAD_DIMS, or WIDER
    alignment: int  # 8 where the head width is a multiple of 8, else 1
    packed: bool
    window: bool
    softcap: bool
    constant_kv_prefix: bool
    return_lse: bool


def rounded_head_dim(head_dim: int) -> int:
    for width in HEAD_DIMS:
        if head_dim <= width:
            return width
    return WIDER


def unable(implementation: str, request: Request) -> str:
    """Why an implementation cannot run this call, or ""."""
    if reason := operator.OPERATORS["attention"].unavailable(implementation, request.device_type):
        return reason
    if implementation == "triton" and request.head_dim > MAX_TRITON_HEAD_DIM:
        return f"its heads are at most {MAX_TRITON_HEAD_DIM} wide"
    return external.LIMITS[implementation](request) if implementation in external.LIMITS else ""


def order_for(request: Request) -> tuple[tuple[str, ...], str]:
    """The implementations in the order of the device's table, and where that order comes from."""
    device = "cpu"
    if request.device_type == "cuda":
        device = architecture_of(torch.device("cuda")) if torch.cuda.is_available() else ARCHITECTURES[0]
    return order_of_choice("attention", device, request.head_dim)


_choices: dict[tuple[object, ...], str] = {}


def choose(implementation: str, *request: object) -> str:
    """The implementation that runs a call. Raises ValueError when an explicitly named one cannot.

    The fields of the request are arguments of their own because torch.compile takes no named tuple for a constant.
    """
    key = (implementation, *request)
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choices[key] = _choose(implementation, Request(*request))  # type: ignore[arg-type]
    return chosen


choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as operator.choose


def _choose(implementation: str, request: Request) -> str:
    if implementation != "auto":
        operator.require_available(operator.OPERATORS["attention"], implementation, request.device_type)
        if reason := unable(implementation, request):
            raise ValueError(
                f'implementation="{implementation}" cannot run this attention: {reason}; '
                'choose implementation="auto" or "reference"'
            )
        return implementation
    order, _ = order_for(request)
    for candidate in order:
        if not unable(candidate, request):
            return candidate
    reasons = "; ".join(f"{candidate}: {unable(candidate, request)}" for candidate in order)
    operator.warn_of_reference("attention", request.device_type, reasons, stacklevel=5)
    return "reference"


def explanation_of(implementation: str, request: Request) -> Explanation:
    """What `choose` answers, and why not the others."""
    chosen = choose(implementation, *request)
    order, provenance = order_for(request)
    if implementation != "auto":
        reason = "it was asked for"
    elif chosen in order:
        reason = f"the first that can run this call of {', '.join(order)} ({provenance})"
    else:
        reason = f"none of {', '.join(order)} can run this call"
    later = f"{chosen} {'was asked for' if implementation != 'auto' else 'comes first'}"
    names = operator.OPERATORS["attention"].implementations
    others = {name: unable(name, request) or later for name in names if name != chosen}
    return Explanation("attention", chosen, reason, others)
