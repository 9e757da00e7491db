"""Finds what would make the host wait for the device, on a machine without one."""

import contextlib
from collections.abc import Iterator

from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::") in _WAITING:
            self.waited.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def assert_never_waits() -> Iterator[None]:
    """Asserts that nothing within it reads a tensor's value on the host (`item`, `bool`, `nonzero`, ...)."""
    with _Watch() as watch:
        yield
    assert not watch.waited, f"the host waits for the device: {watch.waited}"
