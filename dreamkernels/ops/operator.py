"""What every operator shares: the torch.library namespace, its implementations, and the choice between them.

An operator `name` is defined as four overloads of one schema, so that each call crosses the dispatcher once:

    name             differentiable; CPU from C++, CUDA from Triton
    name.inference   the same kernels without autograd: about 5 us less per call, used when no gradient is needed
    name.triton      Triton explicitly, where it exists; under TRITON_INTERPRET=1 also on CPU tensors
    name.cuda        CUDA C++ explicitly, where it exists
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "dreamkernels"
IMPLEMENTATIONS = ("cpu", "triton", "cuda", "reference")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPERATORS: dict[str, Operator] = {}


class FallbackWarning(UserWarning):
    """An operator runs a slower implementation than it could; the message says which, why and what it costs."""


@dataclass(frozen=True)
class Autograd:
    """The backward of an operator. `backward(backward_overload)` makes the function that torch.library registers."""

    backward: Callable[[Any], Callable[..., Any]]
    setup_context: Callable[..., None]
    backward_operator: Operator


@dataclass
class Operator:
    """One dispatcher operator with its implementations."""

    name: str
    schema: str
    dtypes: tuple[torch.dtype, ...]
    triton: str  # "module:function" of the Triton implementation; "": there is none
    cuda: bool = False  # the CUDA C++ library implements it too
    # Implementations by other libraries, called without the dispatcher: name -> why not on a device type, or ""
    external: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    explain: Callable[..., Any] | None = None  # where the choice depends on more than the device (ops/explanation.py)
    overloads: dict[str, Any] = field(default_factory=dict)
    recorders: dict[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # by overload: the call that records a gradient

    @property
    def implementations(self) -> tuple[str, ...]:
        """The names that `implementation` may take beside "auto"."""
        return (*IMPLEMENTATIONS, *self.external)

    def qualified(self, overload: str = "default") -> str:
        return f"{NAMESPACE}::{self.name}" + ("" if overload == "default" else f".{overload}")

    def unavailable(self, implementation: str, device_type: str) -> str:
        """Why an implementation cannot run on a device, or "" when it can."""
        if implementation == "reference":
            return ""
        if implementation in self.external:
            return self.external[implementation](device_type)
        if implementation == "cpu":
            if device_type != "cpu":
                return "it runs on cpu tensors only"
            return "" if has_kernel(self.qualified(), "CPU") else "the compiled CPU library is not loaded"
        if implementation == "triton":
            if not self.triton:
                return "this operator has no Triton implementation"
            if not triton_installed():
                return "triton is not installed"
            if device_type == "cuda" or (device_type == "cpu" and interpreting()):
                return ""
            return "it runs on cuda tensors (on cpu tensors only under TRITON_INTERPRET=1)"
        if not self.cuda:
            return "this operator has no CUDA C++ implementation"
        if device_type != "cuda":
            return "it runs on cuda tensors only"
        return "" if has_kernel(self.qualified("cuda"), "CUDA") else "the CUDA C++ library is not loaded"


def row_major_like(x: torch.Tensor) -> torch.Tensor:
    """An empty row-major tensor with the shape, dtype and device of x, whatever its strides: what most fakes return."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def has_kernel(qualified_name: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, dispatch_key)


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors. Triton reads this when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: str = "",
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
    cuda: bool = False,
    autograd: Autograd | None = None,
    external: Mapping[str, Callable[[str], str]] | None = None,
    explain: Callable[..., Any] | None = None,
) -> Operator:
    """Defines an operator with overloads, fake, Triton and autograd. C++ registers itself when the libraries load."""
    operator = Operator(name, schema, dtypes, triton, cuda, external or {}, explain)
    overloads = ["default"] + (["triton"] if triton else [])
    overloads += (["inference"] if autograd else []) + (["cuda"] if cuda else [])
    for overload in overloads:
        qualified = operator.qualified(overload)
        LIBRARY.define(qualified.removeprefix(f"{NAMESPACE}::") + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        operator.overloads[overload] = getattr(getattr(torch.ops.dreamkernels, name), overload)
        if operator.overloads[overload]._schema.is_mutable:
            _register_mutation(operator.overloads[overload], qualified)
    if triton and triton_installed():
        _register_triton(operator)
    if autograd:
        _register_autograd(operator, autograd)
    OPERATORS[name] = operator
    return operator


def _register_triton(operator: Operator) -> None:
    module, function = operator.triton.split(":")

    def launch(*args: Any) -> Any:  # importing Triton takes long, so it waits for the first call
        return getattr(importlib.import_module(module), function)(*args)

    for overload in operator.overloads:
        if overload != "cuda":
            LIBRARY.impl(operator.qualified(overload).removeprefix(f"{NAMESPACE}::"), launch, "CUDA")
    if interpreting():
        LIBRARY.impl(f"{operator.name}.triton", launch, "CPU")


def _register_mutation(overload: Any, qualified_name: str) -> None:
    """Makes calls of a mutating operator count as changes of its arguments, so that autograd notices."""
    arguments = overload._schema.arguments
    written = [k for k, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]

    def count_change(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[k] for k in written])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(qualified_name.removeprefix(f"{NAMESPACE}::"), count_change, "ADInplaceOrView", with_keyset=True)


def _register_autograd(operator: Operator, autograd: Autograd) -> None:
    for overload in operator.overloads:
        if overload == "inference":
            continue
        backward = autograd.backward(
            autograd.backward_operator.overloads["triton" if overload == "triton" else "default"]
        )
        torch.library.register_autograd(
            operator.qualified(overload), backward, setup_context=autograd.setup_context, lib=LIBRARY
        )
        kernel = operator.overloads["inference" if overload == "default" else overload]
        if "Tensor[]" in operator.schema:  # autograd.Function does not look into lists; the registered formula does
            operator.recorders[overload] = operator.overloads[overload]
        else:
            operator.recorders[overload] = _recorder(kernel, backward, autograd.setup_context)


def _recorder(kernel: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """What the registered autograd does, without crossing the dispatcher to get there: 7 us instead of 17."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = kernel(*inputs)
        setup_context(ctx=ctx, inputs=inputs, output=output)
        return output

    function = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Recorded_{kernel.name()}", (torch.autograd.Function,), function).apply  # type: ignore[attr-defined]


_choices: dict[tuple[str, str, str], str] = {}


def choose(name: str, implementation: str, device_type: str) -> str:
    """Which implementation of an operator a call runs: one of its `implementations`, never "auto".

    "auto" takes the compiled kernel of the device (CPU: C++, CUDA: Triton); where it is missing, the reference, with
    one warning.
    Raises ValueError when an explicitly named implementation cannot run on the device.
    """
    key = (name, implementation, device_type)
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choices[key] = _choose(*key)
    return chosen


# What torch.compiler.assume_constant_result does: torch.compile runs the function while tracing and keeps its result.
# The decorator itself would import torch._dynamo, which takes longer than everything else here together.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(name: str, implementation: str, device_type: str) -> str:
    operator = OPERATORS[name]
    if implementation == "auto":
        preferred = preferred_on(device_type)
        reason = operator.unavailable(preferred, device_type)
        if not reason:
            return preferred
        warn_of_reference(name, device_type, f"{preferred}: {reason}", stacklevel=5)
        return "reference"
    require_available(operator, implementation, device_type)
    return implementation


def preferred_on(device_type: str) -> str:
    """The compiled kernels of a device: C++ on the CPU, Triton on CUDA."""
    return "triton" if device_type == "cuda" else "cpu"


def warn_of_reference(name: str, device_type: str, reason: str, stacklevel: int) -> None:
    """The one warning of a fallback. On the CPU the missing library was reported at import."""
    if device_type != "cpu":
        warnings.warn(
            f"{name} on {device_type} runs its reference in eager PyTorch ({reason}); "
            "expect several times the time and memory traffic of the compiled operator",
            FallbackWarning,
            stacklevel=stacklevel,
        )


def require_available(operator: Operator, implementation: str, device_type: str) -> None:
    """Raises ValueError when an explicitly named implementation is unknown or cannot run on the device."""
    if implementation not in operator.implementations:
        raise ValueError(f"implementation {implementation!r} is unknown (auto, {', '.join(operator.implementations)})")
    if reason := operator.unavailable(implementation, device_type):
        raise ValueError(
            f'implementation="{implementation}" of {operator.name} cannot run on {device_type}: {reason}; '
            'choose implementation="auto" or "reference"'
        )


def overload_for(operator: Operator, chosen: str, needs_grad: bool) -> Callable[..., Any]:
    """What runs a chosen implementation: an overload of the operator, or in eager mode the recorder of its gradient."""
    if chosen == "cuda" or (chosen == "triton" and interpreting()):
        overload = chosen
    else:
        overload = "default" if needs_grad or "inference" not in operator.overloads else "inference"
    if needs_grad and not torch.compiler.is_compiling():
        return operator.recorders[overload]
    return operator.overloads[overload]


def support_matrix() -> list[dict[str, Any]]:
    """One row per operator and implementation: for each device the dtypes, or why it cannot run here."""
    rows = []
    for _, operator in sorted(OPERATORS.items()):
        for implementation in operator.implementations:
            if (implementation == "cuda" and not operator.cuda) or (implementation == "triton" and not operator.triton):
                continue
            devices = {}
            for device_type in ("cpu", "cuda"):
                reason = operator.unavailable(implementation, device_type)
                if not reason and device_type == "cuda" and not torch.cuda.is_available():
                    reason = "it is registered, but this machine has no CUDA device"
                devices[device_type] = {
                    "dtypes": [] if reason else [str(dtype).removeprefix("torch.") for dtype in operator.dtypes],
                    "reason": reason,
                }
            rows.append({"operator": operator.name, "implementation": implementation, "devices": devices})
    return rows
