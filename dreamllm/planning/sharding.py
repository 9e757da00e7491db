"""How the trained parameters' states are spread over GPUs, what that holds in memory, and what it sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dreamllm.planning.devices import LINK_EFFICIENCY, Device
from dreamllm.profiling.workload import Precision

Sharding = Literal["none", "grad_op", "full", "hybrid"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
"""As in `RunSettings`. none: every GPU holds everything, gradients are averaged. grad_op: states are divided, the
weights that compute are gathered once per pass and stay. full: gathered layer by layer, twice. hybrid: as full within a
node, gradients averaged between nodes. Frozen parts are whole, as in the original, unless a threshold divides the large
ones."""


@dataclass(frozen=True)
class Layout:
    """Trained and frozen parameters of a model, and the largest unit that is gathered at once.

    Of the frozen ones, `spread_layers` and `spread_parts` are divided like the trained: decoder layers, gathered one by
    one in both passes, and parts that are gathered once per micro-batch, at most `gathered` at a time of either.
    """

    trained: int
    frozen: int
    unit: int
    spread_layers: int = 0
    spread_parts: int = 0
    gathered: int = 0

    @property
    def spread(self) -> int:
        return self.spread_layers + self.spread_parts


@dataclass(frozen=True)
class Bytes:
    """Per parameter: the kept weight, its gradient, both moments, and the weight that computes."""

    weight: int
    gradient: int
    moments: int
    working: int


PER_PARAMETER: dict[Precision, Bytes] = {
    "float32": Bytes(4, 4, 8, 4),
    "bfloat16": Bytes(4, 4, 8, 2),
    "pure_bfloat16": Bytes(2, 2, 4, 2),
}


def shards(sharding: Sharding, gpus: int, gpus_per_node: int) -> int:
    """Into how many pieces the states are divided."""
    if sharding == "none":
        return 1
    return min(gpus, gpus_per_node) if sharding == "hybrid" else gpus


def state_bytes(
    layout: Layout, sharding: Sharding, precision: Precision, gpus: int, gpus_per_node: int
) -> dict[str, float]:
    """What one GPU holds between and during steps besides activations, by kind. `sharding` is not "none"."""
    each = PER_PARAMETER[precision]
    pieces = shards(sharding, gpus, gpus_per_node)
    gathered = layout.trained if sharding == "grad_op" else min(layout.trained, 2 * layout.unit)
    separate = pieces > 1 or each.working != each.weight
    return {
        "parameters": layout.trained * each.weight / pieces,
        "gradients": layout.trained * each.gradient / pieces,
        "optimiser": layout.trained * each.moments / pieces,
        "gathered weights": (gathered if separate else 0) * each.working
        + (layout.gathered * each.working if pieces > 1 else 0),
        "frozen parts": (layout.frozen - layout.spread + layout.spread / pieces) * each.working,
        # One unit's gradients wait for the reduction while the next one's are made.
        "communication buffers": 2 * min(layout.unit, layout.trained) * (each.working + each.gradient)
        if pieces > 1
        else 0.0,
    }


def optimiser_bytes(layout: Layout, sharding: Sharding, precision: Precision, gpus: int, gpus_per_node: int) -> float:
    """Moved per step by clipping (norm, then scaling) and AdamW on one GPU's piece."""
    each = PER_PARAMETER[precision]
    adamw = 2 * each.weight + each.gradient + 2 * each.moments
    return layout.trained * (adamw + 3 * each.gradient) / shards(sharding, gpus, gpus_per_node)


@dataclass(frozen=True)
class Traffic:
    """Seconds that one micro-batch's communication takes by itself, in its forward and its backward pass.

    `first`: of the first unit's gathering, which nothing can hide. `description` says what is sent over what.
    """

    forward: float
    backward: float
    first: float
    description: str


def traffic(
    layout: Layout, sharding: Sharding, precision: Precision, gpus: int, device: Device, accumulation: int
) -> Traffic:
    """What the sharding sends for one micro-batch. With "none", a step's one exchange is spread over its passes."""
    if gpus == 1:
        return Traffic(0.0, 0.0, 0.0, "one GPU: nothing is sent")
    each = PER_PARAMETER[precision]
    weights, gradients = layout.trained * each.working, layout.trained * each.gradient
    inside = min(gpus, device.gpus_per_node)
    wide = _bandwidth(gpus, device)
    if sharding == "none":
        seconds = 2 * gradients * (gpus - 1) / gpus / wide / accumulation
        return Traffic(0.0, seconds, 0.0, f"all-reduce of {gradients / 1e9:.2f} GB at {wide / 1e9:.0f} GB/s")
    group = gpus if sharding != "hybrid" else inside
    bandwidth = _bandwidth(group, device)
    frozen = (2 * layout.spread_layers + layout.spread_parts) * each.working
    gather = weights * (group - 1) / group / bandwidth
    reduce = gradients * (group - 1) / group / bandwidth
    again = 0.0 if sharding == "grad_op" else gather
    text = (
        f"{'one all-gather' if not again else 'two all-gathers'} of {weights / 1e9:.2f} GB and a reduce-scatter of "
        f"{gradients / 1e9:.2f} GB over {group} GPUs at {bandwidth / 1e9:.0f} GB/s"
    )
    between = 0.0
    nodes = gpus // inside
    if sharding == "hybrid" and nodes > 1:
        slow = device.network_gb_per_s * 1e9 * LINK_EFFICIENCY
        between = 2 * gradients / inside * (nodes - 1) / nodes / slow
        text += f", an all-reduce of {gradients / inside / 1e9:.2f} GB over {nodes} nodes at {slow / 1e9:.0f} GB/s"
    first = gather * min(1.0, layout.unit / max(1, layout.trained))
    forward = gather
    if frozen:
        text += f", all-gathers of {frozen / 1e9:.2f} GB of frozen parts"
        layers, parts = (
            n * each.working * (group - 1) / group / bandwidth for n in (layout.spread_layers, layout.spread_parts)
        )
        forward, again = gather + layers + parts, again + layers
    return Traffic(forward, again + reduce + between, first, text)


def _bandwidth(group: int, device: Device) -> float:
    """Bytes per second of a large collective: NVLink in one direction inside a node; across nodes, the rings of a node
    share its adapters, or NVLink where that is slower."""
    links = device.nvlink_gb_per_s / 2
    if group > device.gpus_per_node:
        links = min(links, device.gpus_per_node * device.network_gb_per_s) if links else device.network_gb_per_s
    return links * 1e9 * LINK_EFFICIENCY
