"""Plans a stage: does it fit, how long does it take, what limits it, and which setting is best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dreamllm.planning.batches import DrawnBatches, Filling, Load, draw_batches, load_of
from dreamllm.planning.devices import GIB, Device, gpus
from dreamllm.planning.estimate import (
    StepTime,
    activation_bytes,
    layout_of,
    memory_slopes,
    operators_time,
    scaled,
    simulate,
)
from dreamllm.planning.paper import OriginalWork, original_work
from dreamllm.planning.records import Records
from dreamllm.planning.sharding import (
    PER_PARAMETER,
    SHARDINGS,
    Layout,
    Sharding,
    Traffic,
    optimiser_bytes,
    shards,
    state_bytes,
    traffic,
)
from dreamllm.planning.waiting import group_loads, slowest_gpu_seconds
from dreamllm.profiling.workload import Precision, Recording
from dreamllm.training import LoraSettings
from dreamllm.workloads import model_config, model_size
from dreamllm.workloads import stage as find_stage
from dreamllm.workloads.stages import PAPER_GPUS

BASE_MICRO_BATCH = 4
MOST_DOCUMENTS = 64
"""Per pass, of those that are tried."""
TOKEN_MULTIPLE = 64
PAPER_GLOBAL_BATCH = 1024


class DoesNotFitError(ValueError):
    """No setting, or not the given one, fits the memory; the message says by how much and what would."""


@dataclass(frozen=True)
class Request:
    """What is asked for. None lets the search choose, except for `shard_frozen_above_mib`: as in `RunSettings`.

    A pass holds `micro_batch` documents, or at most `tokens_per_batch` tokens and `pictures_per_batch` pictures to
    create. Filled by tokens, a step has `passes` per GPU, by default those that come nearest to `global_batch`
    documents. `lora`: adapters train in the place of the decoder's layers.
    """

    stage: str
    size: str
    gpus: int
    precision: Precision
    global_batch: int
    micro_batch: int | None = None
    sharding: Sharding | None = None
    shard_frozen_above_mib: int | None = None
    tokens_per_batch: int | None = None
    pictures_per_batch: int | None = None
    passes: int | None = None
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "global_batch", "micro_batch", "tokens_per_batch", "pictures_per_batch", "passes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.tokens_per_batch is not None:
            if self.micro_batch is not None:
                raise ValueError("give either micro_batch (documents per pass) or tokens_per_batch, not both")
            return
        for name in ("pictures_per_batch", "passes"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to tokens_per_batch, which is not given")
        if self.global_batch % self.gpus:
            raise ValueError(
                f"global_batch {self.global_batch} documents cannot be divided among {self.gpus} GPUs; "
                f"{math.ceil(self.global_batch / self.gpus) * self.gpus} can"
            )
        per_gpu = self.global_batch // self.gpus
        if self.micro_batch is not None and per_gpu % self.micro_batch:
            allowed = ", ".join(str(n) for n in range(1, per_gpu + 1) if per_gpu % n == 0)
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide the {per_gpu} documents that each GPU has in a step "
                f"({self.global_batch} over {self.gpus} GPUs); {allowed} do"
            )

    def fillings(self) -> list[Filling]:
        """What is tried: the given one, or numbers of documents that divide a GPU's part of a step and, where GPUs
        would wait for the one with the longest documents, as many tokens as these documents have on average."""
        if self.tokens_per_batch is not None:
            return [Filling(tokens=self.tokens_per_batch, pictures=self.pictures_per_batch)]
        counts = self.micro_batches()
        if self.gpus == 1 or self.micro_batch is not None:
            return [Filling(count) for count in counts]
        mean = draw_batches(self.stage, self.size, Filling(1)).mean.tokens
        budgets = [math.ceil(mean * count / TOKEN_MULTIPLE) * TOKEN_MULTIPLE for count in counts]
        longest = model_config(self.size).layout().max_length
        return [*map(Filling, counts), *(Filling(tokens=budget) for budget in budgets if budget >= longest)]

    def micro_batches(self) -> list[int]:
        """Documents per pass: the given ones, or all that divide a GPU's part of a step."""
        if self.micro_batch is not None:
            return [self.micro_batch]
        per_gpu = max(1, self.global_batch // self.gpus)
        return [n for n in range(1, min(per_gpu, MOST_DOCUMENTS) + 1) if per_gpu % n == 0]

    def shardings(self) -> list[Sharding]:
        if self.sharding is not None:
            return [self.sharding]
        return ["none"] if self.gpus == 1 else list(SHARDINGS)


@dataclass
class Candidate:
    """A setting by estimate."""

    sharding: Sharding
    filling: Filling
    memory_bytes: float
    documents_per_second: float
    fits: bool


@dataclass
class Plan:
    """The plan of one setting. Bytes are of the fullest GPU, at the peak of the largest of the drawn batches.

    `time`, `exposed_seconds` and `flops` are of one pass, `update_seconds` and `waiting_seconds` (for the GPU with the
    longest documents) of a step.
    """

    request: Request
    device: Device
    sharding: Sharding
    filling: Filling
    accumulation: int
    layout: Layout
    memory: dict[str, float]
    load: Load
    largest: Load
    time: StepTime
    update_seconds: float
    traffic: Traffic
    exposed_seconds: float
    waiting_seconds: float
    flops: float
    original: OriginalWork
    considered: list[Candidate] = field(default_factory=list)

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.device.usable_bytes

    @property
    def step_seconds(self) -> float:
        passes = self.accumulation * (self.time.seconds + self.exposed_seconds)
        return passes + self.update_seconds + self.waiting_seconds

    @property
    def documents_per_second(self) -> float:
        return self.documents_per_step / self.step_seconds

    @property
    def documents_per_step(self) -> float:
        """A mean where tokens fill the passes."""
        if self.filling.documents is not None:
            return self.request.global_batch
        return self.request.gpus * self.accumulation * self.load.documents

    @property
    def tokens_per_second(self) -> float:
        return self.request.gpus * self.accumulation * self.load.tokens / self.step_seconds

    @property
    def total_documents(self) -> int:
        return find_stage(self.request.stage).total_documents

    @property
    def steps(self) -> int:
        return math.ceil(self.total_documents / self.documents_per_step)

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def share_of_peak(self) -> float:
        return self.accumulation * self.flops / self.step_seconds / self.device.peak_flops

    @property
    def papers_share_of_peak(self) -> float | None:
        """Of 128 A800 in the paper's hours, had they done this plan's work; None where the paper gives no hours.

        Times `original.factor` it is that of the work as the original does it.
        """
        hours = find_stage(self.request.stage).paper_hours
        if hours is None or self.request.size != "7b":
            return None
        work = self.flops * self.accumulation * self.request.gpus * self.steps
        return work / (hours * 3600 * PAPER_GPUS * gpus()["a800"].peak_flops)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds of a step by what they are spent on, most first."""
        seconds = {name: self.accumulation * value for name, value in self.time.by_limit.items()}
        seconds["communication"] = self.accumulation * self.exposed_seconds
        seconds["waiting"] = self.waiting_seconds
        seconds["memory"] = seconds.get("memory", 0.0) + self.update_seconds
        return dict(sorted(((k, v) for k, v in seconds.items() if v), key=lambda item: -item[1]))


class Planner:
    """Evaluates settings of one request on one device. `say` is told what takes seconds."""

    def __init__(
        self, request: Request, device: Device, records: Records | None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        if device.key == "cpu" and request.gpus != 1:
            raise ValueError(f"a plan for the cpu is for one process, not {request.gpus}")
        if device.key != "cpu" and request.precision == "float32":
            raise ValueError("float32 is planned for the cpu only: on a GPU choose bfloat16 or pure_bfloat16")
        self.request, self.device, self.records, self.say = request, device, records, say

    def best(self) -> Plan:
        """The fastest setting that fits. Raises `DoesNotFitError` when none does."""
        request = self.request
        candidates = []
        shardings, fillings = request.shardings(), request.fillings()
        for sharding in [s for s in shardings if not self._hopeless(s)] or shardings[-1:]:
            candidates += [self._candidate(sharding, filling) for filling in fillings]
        candidates.sort(key=lambda c: (not c.fits, -c.documents_per_second if c.fits else c.memory_bytes))
        nearest: Plan | None = None
        for candidate in candidates:
            plan = self.evaluate(candidate.sharding, candidate.filling)
            candidate.fits, candidate.memory_bytes = plan.fits, plan.memory_bytes
            candidate.documents_per_second = plan.documents_per_second
            if plan.fits:
                plan.considered = candidates
                return plan
            if nearest is None or plan.memory_bytes < nearest.memory_bytes:
                nearest = plan
            if len(candidates) > 4 and not any(c.fits for c in candidates):
                break  # the estimates of the others are larger still
        assert nearest is not None
        raise DoesNotFitError(self._what_would_fit(nearest))

    def evaluate(self, sharding: Sharding, filling: Filling) -> Plan:
        """The plan of one setting, recorded at its own batches, whether it fits or not."""
        drawn = self._drawn(filling)
        typical, found = self._record(sharding, drawn.typical), load_of(drawn.typical)
        most = drawn.largest(*memory_slopes(typical, found))
        largest = self._record(sharding, most)
        mean = scaled(typical, found, drawn.mean)
        return self._plan(sharding, filling, drawn.mean, load_of(most), mean, largest)

    def _candidate(self, sharding: Sharding, filling: Filling) -> Candidate:
        """By scaling one recording."""
        base = self._drawn(Filling(min(BASE_MICRO_BATCH, max(self.request.micro_batches()))))
        recording, found = self._record(sharding, base.typical), load_of(base.typical)
        drawn = self._drawn(filling)
        most = load_of(drawn.largest(*memory_slopes(recording, found)))
        mean, largest = scaled(recording, found, drawn.mean), scaled(recording, found, most)
        plan = self._plan(sharding, filling, drawn.mean, most, mean, largest)
        return Candidate(sharding, filling, plan.memory_bytes, plan.documents_per_second, plan.fits)

    def _hopeless(self, sharding: Sharding) -> bool:
        """Whether the states alone exceed the memory, so that nothing need be recorded."""
        request, device = self.request, self.device
        executed = self._executed("grad_op")
        layout = layout_of(request.stage, request.size, executed, lora=request.lora)
        each = PER_PARAMETER[request.precision]
        pieces = shards(sharding, request.gpus, device.gpus_per_node)
        return layout.trained * (each.weight + each.gradient + each.moments) / pieces > device.usable_bytes

    def _plan(
        self,
        sharding: Sharding,
        filling: Filling,
        mean_load: Load,
        largest_load: Load,
        mean: Recording,
        largest: Recording,
    ) -> Plan:
        request, device = self.request, self.device
        accumulation = request.passes or max(1, round(request.global_batch / request.gpus / mean_load.documents))
        layout = self._layout(sharding)
        passes = [operator for operator in mean.operators if operator.part != "optimiser"]
        time = operators_time(passes, device, self.records)
        if sharding == "none":
            own = [operator for operator in mean.operators if operator.part == "optimiser"]
            update = operators_time(own, device, self.records).seconds
        else:
            moved = optimiser_bytes(layout, sharding, request.precision, request.gpus, device.gpus_per_node)
            update = moved / (device.memory_gb_per_s * 1e9 * device.efficiency["memory"])
        sent = traffic(layout, sharding, request.precision, request.gpus, device, accumulation)
        hidden_forward = time.by_phase.get("forward", 0.0)
        hidden_backward = time.by_phase.get("backward", 0.0)
        exposed = sent.first + max(0.0, sent.forward - hidden_forward) + max(0.0, sent.backward - hidden_backward)
        loads = group_loads(request.stage, request.size, filling)
        waiting = slowest_gpu_seconds(time, mean_load, loads, request.gpus, accumulation, sharding != "none")
        return Plan(
            request,
            device,
            sharding,
            filling,
            accumulation,
            layout,
            self._memory(sharding, layout, largest),
            mean_load,
            largest_load,
            time,
            update,
            sent,
            exposed,
            waiting,
            mean.flops,
            original_work(request.stage, request.size, self._executed(sharding), mean, mean_load),
        )

    def _memory(self, sharding: Sharding, layout: Layout, recording: Recording) -> dict[str, float]:
        request = self.request
        if sharding == "none":
            held = recording.held_bytes
            memory: dict[str, float] = {k: held[k] for k in ("parameters", "optimiser", "frozen parts")}
        else:
            memory = state_bytes(layout, sharding, request.precision, request.gpus, self.device.gpus_per_node)
        for kind, size in activation_bytes(recording, sharding != "none").items():
            memory[kind] = memory.get(kind, 0.0) + size
        return {kind: size for kind, size in memory.items() if size}

    def _layout(self, sharding: Sharding) -> Layout:
        request = self.request
        above = None if sharding == "none" else request.shard_frozen_above_mib
        return layout_of(request.stage, request.size, self._executed(sharding), above, request.lora)

    def _executed(self, sharding: Sharding) -> Precision:
        """How the passes compute: with sharding, the weights are gathered in bfloat16 instead of cast."""
        precision = self.request.precision
        return "pure_bfloat16" if precision == "bfloat16" and sharding != "none" else precision

    def _drawn(self, filling: Filling) -> DrawnBatches:
        return draw_batches(self.request.stage, self.request.size, filling)

    def _record(self, sharding: Sharding, documents: list) -> Recording:
        executed = self._executed(sharding)
        self.say(f"recording a step of {len(documents)} documents, {load_of(documents).tokens:.0f} tokens")
        return simulate(self.request.stage, self.request.size, executed, documents, self.request.lora)

    def _what_would_fit(self, nearest: Plan) -> str:
        request, device = self.request, self.device
        over = nearest.memory_bytes - device.usable_bytes
        lines = [
            f"{request.stage} of the {request.size} model does not fit on {request.gpus} x {device.name}: sharding "
            f"{nearest.sharding} with {nearest.filling} needs {_size(nearest.memory_bytes)} per "
            f"GPU, {_size(over)} more than the {_size(device.usable_bytes)} that can be used. It needs "
            + ", ".join(f"{_size(size)} for {kind}" for kind, size in _largest(nearest.memory))
        ]
        fitting = self._fitting_setting(nearest) or self._fitting_number()
        lines.append(
            f"What would fit: {fitting}" if fitting else "No number of these GPUs fits it; a smaller size would"
        )
        return ". ".join(lines)

    def _fitting_setting(self, nearest: Plan) -> str | None:
        """With the same GPUs, where a setting was given: smaller passes, another sharding."""
        request = self.request
        found = []
        if request.micro_batch is not None:
            smaller = [n for n in range(1, request.micro_batch) if request.micro_batch % n == 0]
            found += self._first_fitting(nearest.sharding, [Filling(n) for n in reversed(smaller)])
        if request.tokens_per_batch is not None:
            longest = model_config(request.size).layout().max_length
            halves = [longest << k for k in reversed(range(20)) if longest << k < request.tokens_per_batch]
            fillings = [Filling(tokens=tokens, pictures=request.pictures_per_batch) for tokens in halves]
            found += self._first_fitting(nearest.sharding, fillings)
        if request.sharding is not None and request.gpus > 1:
            others = (s for s in SHARDINGS if s != request.sharding and not self._hopeless(s))
            fitting = (s for s in others if self.evaluate(s, nearest.filling).fits)
            found += [f"sharding {s} with {nearest.filling}" for s in itertools.islice(fitting, 1)]
        return ", or ".join(found) or None

    def _first_fitting(self, sharding: Sharding, fillings: list[Filling]) -> list[str]:
        fitting = (filling for filling in fillings if self.evaluate(sharding, filling).fits)
        return [f"{filling} with sharding {sharding}" for filling in itertools.islice(fitting, 1)]

    def _fitting_number(self) -> str | None:
        """The least number of GPUs, from the given one on, that fits one document each."""
        request, device = self.request, self.device
        if device.key == "cpu":
            return None
        counts = [request.gpus, *(n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n > request.gpus)]
        for count in counts:
            for sharding in SHARDINGS[1:] if count > 1 else SHARDINGS[:1]:
                asked = Request(
                    request.stage, request.size, count, request.precision, count, None, sharding, lora=request.lora
                )
                if Planner(asked, device, self.records).evaluate(sharding, Filling(1)).fits:
                    return f"{count} GPU{'s' if count > 1 else ''} with sharding {sharding} and micro_batch 1"
        return None


def _size(bytes_: float) -> str:
    return f"{bytes_ / GIB:.1f} GiB" if bytes_ >= 0.1 * GIB else f"{bytes_ / 2**20:.1f} MiB"


def _largest(memory: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(memory.items(), key=lambda item: -item[1])[:3]


def make_plan(
    request: Request, device: Device, records: Records | None = None, say: Callable[[str], None] = lambda _: None
) -> Plan:
    """The best plan for `request`, or the plan of the setting that it gives.

    Raises `ValueError` for an unknown stage or size and for impossible numbers, `DoesNotFitError` (a `ValueError`) when
    the memory does not suffice.
    """
    find_stage(request.stage)
    model_size(request.size)
    longest = model_config(request.size).layout().max_length
    if request.tokens_per_batch is not None and request.tokens_per_batch < longest:
        raise ValueError(
            f"tokens_per_batch {request.tokens_per_batch} must hold a document of {longest} tokens, the longest of the "
            f"{request.size} model"
        )
    return Planner(request, device, records, say).best()
