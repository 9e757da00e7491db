"""From a recorded step to seconds on a device and bytes on a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from dreamllm.documents import EncodedDocument
from dreamllm.model import DreamLLM
from dreamllm.planning.batches import Load, pack
from dreamllm.planning.devices import Device
from dreamllm.planning.records import Records
from dreamllm.planning.sharding import Layout
from dreamllm.profiling.recorder import GRADIENTS, HELD_COPIES, Operator
from dreamllm.profiling.workload import Precision, PreparedStep, Recording, as_fake, prepare
from dreamllm.training import LoraSettings
from dreamllm.training.frozen import GATHERED, large_parts
from dreamllm.workloads import stage_config

DRIVERS = {
    "LLM": "tokens",
    "loss": "targets",
    "CLIP": "images",
    "VAE": "pictures",
    "UNet": "pictures",
    "joints": "tokens",
}
"""What the work and the memory of each part grow with."""


@lru_cache(maxsize=4)
def _prepared(stage: str, size: str, precision: Precision, lora: LoraSettings | None) -> PreparedStep:
    return prepare(size, replace(stage_config(stage, size), lora=lora), precision, fake=True)


def model_of(stage: str, size: str, precision: Precision, lora: LoraSettings | None = None) -> DreamLLM:
    """The model of the stage on tensors without memory, its parameters trained or frozen as in it."""
    return _prepared(stage, size, precision, lora).model


_recorded: dict[tuple[object, ...], Recording] = {}


def simulate(
    stage: str,
    size: str,
    precision: Precision,
    documents: list[EncodedDocument],
    lora: LoraSettings | None = None,
) -> Recording:
    """Records the real training step on `documents` with tensors that have shapes but no memory. Once per set of
    documents, which their names identify."""
    key = (stage, size, precision, lora, *(document.name for document in documents))
    if key not in _recorded:
        step = _prepared(stage, size, precision, lora)
        batch = pack(documents, size)
        _recorded[key] = step.record(as_fake(batch, step), [len(document) for document in documents], timed=False)
    return _recorded[key]


def layout_of(
    stage: str,
    size: str,
    precision: Precision,
    shard_frozen_above_mib: int | None = None,
    lora: LoraSettings | None = None,
) -> Layout:
    """Trained and frozen parameters of the stage; frozen parts that take more than the threshold are spread."""
    model = model_of(stage, size, precision, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    layers = next((list(m) for m in model.decoder.modules() if isinstance(m, torch.nn.ModuleList)), [])
    units = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers]
    units.append(max((p.numel() for p in trained), default=0))
    held = torch.float32 if precision == "float32" else torch.bfloat16
    large = large_parts(model, shard_frozen_above_mib, held)
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in large & set(GATHERED)}
    own = [sum(p.numel() for p in layer.parameters()) for layer in layers] if "language_model" in large else [0]
    drawn = sum(size for name, size in sizes.items() if name != "vision_model")
    gathered = max(2 * max(own), drawn, sizes.get("vision_model", 0))
    return Layout(sum(p.numel() for p in trained), frozen, max(units), sum(own), sum(sizes.values()), gathered)


# -- time --------------------------------------------------------------------------------------------------------------


@dataclass
class StepTime:
    """Seconds of one micro-batch's passes. `by_limit`: what bounds the operators ("compute", "memory", "measured",
    "launch"); `by_part` and `by_phase` add up to the same, without what the host adds."""

    by_limit: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_part: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_phase: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    measured_share: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.by_limit.values())


def operators_time(operators: Iterable[Operator], device: Device, records: Records | None) -> StepTime:
    """Sums operators: measured where `records` know them, limits times efficiencies otherwise."""
    time = StepTime()
    calls = 0
    for operator in operators:
        seconds, limit = operator_seconds(operator, device, records)
        calls += operator.calls
        time.by_limit[limit] += operator.calls * seconds
        time.by_part[operator.part] += operator.calls * seconds
        time.by_phase[operator.phase] += operator.calls * seconds
    busy = time.seconds
    time.measured_share = time.by_limit.get("measured", 0.0) / busy if busy else 0.0
    outside = records.outside * busy if records is not None else 0.0
    time.by_limit["launch"] += outside if device.key == "cpu" else max(0.0, calls * device.launch_seconds - busy)
    return time


def operator_seconds(operator: Operator, device: Device, records: Records | None) -> tuple[float, str]:
    """One call, and what bounds it."""
    measured = None if records is None else records.seconds(operator)
    if measured is not None:
        return measured, "measured"
    kind = "matrix product" if operator.kind == "cross entropy" else operator.kind
    compute = operator.flops / (device.peak_flops * device.efficiency.get(kind, device.efficiency["matrix product"]))
    memory = operator.bytes / (device.memory_gb_per_s * 1e9 * device.efficiency["memory"])
    if max(compute, memory) < device.least_kernel_seconds:
        return device.least_kernel_seconds, "launch"
    return (compute, "compute") if compute > memory else (memory, "memory")


# -- memory ------------------------------------------------------------------------------------------------------------


def activation_bytes(recording: Recording, sharded: bool) -> dict[str, float]:
    """What lives at the peak beyond parameters and their moments, by kind; of a sharded run also without the
    gradients, which `state_bytes` counts."""
    kinds: dict[str, float] = defaultdict(float)
    for (part, phase), size in (recording.at_peak_besides_gradients if sharded else recording.at_peak).items():
        kinds[_kind(part, phase)] += size
    kinds["batch"] += recording.held_bytes["batch"]
    return {kind: size for kind, size in kinds.items() if size}


def _kind(part: str, phase: str) -> str:
    if part == HELD_COPIES:
        return "gathered weights"
    if part == GRADIENTS:
        return "gradients"
    if part == "loss":
        return "logits and loss"
    if phase != "forward":
        return "temporaries"
    return f"activations, {part if part in ('LLM', 'UNet', 'VAE') else 'other'}"


def scaled(recording: Recording, found: Load, wanted: Load) -> Recording:
    """The recording of `found` as it would be for `wanted`: work and memory of each part in proportion to what drives
    it. Used to choose; what was chosen is recorded itself."""

    def factor(part: str) -> float:
        driver = DRIVERS.get(part)
        before = getattr(found, driver) if driver else 0.0
        return getattr(wanted, driver) / before if driver and before else 1.0

    operators = [
        replace(op, flops=round(op.flops * factor(op.part)), bytes=round(op.bytes * factor(op.part)))
        for op in recording.operators
    ]
    at_peak, besides = (
        _with_encoding({key: round(size * factor(key[0])) for key, size in found.items()}, recording, factor)
        for found in (recording.at_peak, recording.at_peak_besides_gradients)
    )
    held = {**recording.held_bytes, "batch": round(recording.held_bytes["batch"] * factor("UNet"))}
    return replace(
        recording,
        operators=operators,
        at_peak=at_peak,
        at_peak_besides_gradients=besides,
        peak_bytes=sum(at_peak.values()),
        held_bytes=held,
    )


def _with_encoding(
    at_peak: dict[tuple[str, str], int], recording: Recording, factor: Callable[[str], float]
) -> dict[tuple[str, str], int]:
    """While the VAE runs, the language model's activations are alive and the UNet's are not made yet."""
    waiting = sum(size for (part, _), size in at_peak.items() if part not in ("UNet", "VAE", GRADIENTS))
    more = waiting + recording.peak_of.get("VAE", 0) * factor("VAE") - sum(at_peak.values())
    if more <= 0:
        return at_peak
    return {**at_peak, ("VAE", "forward"): at_peak.get(("VAE", "forward"), 0) + round(more)}


def memory_slopes(recording: Recording, found: Load) -> tuple[float, float]:
    """Bytes per token and bytes per created picture at the peak."""
    by_part: dict[str, float] = defaultdict(float)
    for (part, _), size in recording.at_peak_besides_gradients.items():
        by_part[part] += size
    return by_part["LLM"] / max(1.0, found.tokens), by_part["UNet"] / max(1.0, found.pictures)
