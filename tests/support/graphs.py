"""A stand-in for CUDA's capture: replaying runs the function again, into the same memory."""

from collections.abc import Callable

from torch import Tensor


def rerunning(captures: list[int]) -> Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]:
    """A capture for `GraphedCalls` on any device; appends to `captures` the size of each result."""

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        result = run().clone()
        captures.append(len(result))
        return lambda: result.copy_(run()), result

    return capture
