"""What an operator is and costs: its kind, floating-point operations and bytes, read from its call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from dreamkernels import DreamCondition

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("attention", "cross_conditioning")),
    ("cross entropy", ("cross_entropy", "nll_loss", "log_softmax")),
    ("diffusion loss", ("diffusion_loss", "add_noise")),
    ("convolution", ("convolution", "conv2d")),
    ("matrix product", ("mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "matmul")),
    ("group norm", ("group_norm",)),
    ("layer norm", ("layer_norm",)),
    ("RMSNorm", ("rms_norm",)),
    ("rotary", ("rotary",)),
    ("SwiGLU", ("swiglu",)),
    ("embedding", ("embedding", "embeddings", "index_select")),
    ("AdamW", ("adamw",)),
    ("cast and copy", ("_to_copy", "copy_", "clone", "contiguous")),
)
"""Kinds of operator, the first whose words occur in the operator's name. Anything else is "element-wise and other"."""

OTHER = "element-wise and other"
_EXACT = {"mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "matmul"}


def kind_of(name: str) -> str:
    """The kind of an operator by its name without namespace and overload, such as "addmm" or "rms_norm_backward"."""
    for kind, words in KINDS:
        for word in words:
            if name == word if word in _EXACT else word in name:
                return kind
    return OTHER


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))
    elif isinstance(values, DreamCondition):
        yield values.columns
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def size_bytes(tensor: Tensor) -> int:
    """The bytes behind a tensor; an expanded one counts what is there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def bytes_moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """The least that must be read and written: every input once, every result and every input that is changed once."""
    read = {id(tensor): size_bytes(tensor) for tensor in tensors_in((args, kwargs))}
    written = {id(tensor): size_bytes(tensor) for tensor in tensors_in(result)}
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.update((id(tensor), size_bytes(tensor)) for tensor in tensors_in(value))
    return sum(read.values()) + sum(written.values())


class FlopCounter:
    """Floating-point operations of calls; a multiplication and an addition are two.

    `lengths`: of the sequences in the packed batch, because attention's cost depends on them and not on tensor shapes.
    `query_spans`: of that batch, for the passes over the positions before its queries and over these (`creation.py`).
    Causal attention counts the pairs that it needs, about half of the square.
    """

    def __init__(self, lengths: Sequence[int], query_spans: Sequence[tuple[int, int, int]] = ()) -> None:
        before = [(first - start, first - start) for start, first, _ in query_spans]
        queries = [(end - first, end - start) for start, first, end in query_spans]
        self._sequences = {_totals(pack): pack for pack in (before, queries, [(n, n) for n in lengths])}

    def count(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
        name = function._schema.name
        if name.startswith("dreamkernels::"):
            values = _named(function, args, kwargs)
            return self._ours(name.removeprefix("dreamkernels::"), values)
        if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            q, k = args[0], args[1]
            return 4 * q.numel() * k.shape[-2]
        formula = flop_registry.get(function._overloadpacket)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))

    def _ours(self, name: str, values: dict[str, Any]) -> int:
        if name in ("attention", "attention_backward"):
            return self._attention(values) * (5 if name.endswith("backward") else 2)
        if name.startswith("cross_conditioning"):
            q, k = values["q"], values["k"]
            products = 5 if name.endswith("backward") else 2
            return products * 2 * q.numel() * k.shape[1]
        if name in ("linear_cross_entropy", "linear_cross_entropy_backward"):
            hidden, weight = values["hidden"], values["weight"]
            products = 1 + values["hidden_grad"] + values["weight_grad"]
            return products * 2 * hidden.numel() * weight.shape[0]
        return 0

    def _attention(self, values: dict[str, Any]) -> int:
        """Of one of its products of queries and keys."""
        q, k = values["q"], values["k"]
        if q.dim() == 3:
            sequences = self._sequences[q.shape[0], k.shape[0]]
            pairs = sum(n * m - (n * (n - 1) // 2 if values["causal"] else 0) for n, m in sequences)
            return 2 * pairs * q.shape[1] * q.shape[2]
        batch, queries, heads, width = q.shape
        keys = k.shape[1]
        pairs = queries * keys - (queries * (queries - 1) // 2 if values["causal"] else 0)
        return 2 * batch * heads * width * pairs


def _totals(sequences: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(n for n, _ in sequences), sum(m for _, m in sequences)


def _named(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in function._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def signature(function: Any, args: Any, kwargs: Any) -> str:
    """The operator with the shapes and dtypes of its tensors and its whole numbers: equal signatures cost the same."""
    shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors_in((args, kwargs))]
    if len(shapes) > 8:  # an optimiser's lists
        total = sum(t.numel() for t in tensors_in((args, kwargs)))
        shapes = [f"{len(shapes)} tensors, {total} elements"]
    numbers = [str(value) for value in args if _is_number(value)]  # such as strides: they decide the result's shape
    return f"{short_name(function)}({', '.join([*shapes, *numbers])})"


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, int) for item in value)
    return isinstance(value, int)


def short_name(function: Any) -> str:
    return function._schema.name.split("::")[1]


def makes_a_view(function: Any) -> bool:
    return function.is_view or function is torch.ops.aten._unsafe_view.default
