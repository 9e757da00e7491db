"""What the Triton implementations share: launching on the tensor's device, and the list of kernels that ship."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Element types as Triton's signatures name them.
TRITON_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Stated because Triton's default changes in 3.10: a * b + c may become one fma.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class ShippedKernel:
    """One Triton kernel at one set of launch parameters, for ahead-of-time compilation and its report."""

    operator: str
    kernel: Any  # the @triton.jit function
    dtype: torch.dtype
    width: int
    signature: dict[str, str]  # argument name -> Triton type, as for a call with 16-byte aligned tensors
    constants: dict[str, Any]
    num_warps: int
    divisible_by_16: tuple[str, ...]  # integer arguments that are multiples of 16 at this width; pointers always are
    num_stages: int | None = None  # of the software pipeline; None: Triton's default, where no loop loads ahead

    @property
    def name(self) -> str:
        constants = " ".join(f"{key.lower()}={_plain(value)}" for key, value in self.constants.items())
        kernel = self.kernel.__name__.removesuffix("_kernel")
        rows = f"{TRITON_DTYPES[self.dtype]} width<={self.width}"
        stages = f" stages={self.num_stages}" if self.num_stages else ""
        return f"{self.operator}.{kernel} {rows} {constants} warps={self.num_warps}{stages}"

    @property
    def options(self) -> dict[str, Any]:
        """What a launch passes beside the arguments."""
        stages = {"num_stages": self.num_stages} if self.num_stages else {}
        return {"num_warps": self.num_warps, **stages, **LAUNCH_OPTIONS}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else str(int(value))


@contextlib.contextmanager
def on_device_of(x: torch.Tensor) -> Iterator[None]:
    """Makes the device of x current: Triton launches on the current device."""
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            yield
    else:
        yield
