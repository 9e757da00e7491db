"""A plan for the terminal, and as JSON values."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dreamllm.planning.batches import Filling
from dreamllm.planning.devices import GIB, LINK_EFFICIENCY
from dreamllm.planning.paper import PAPER_MICRO_BATCH
from dreamllm.planning.plan import Candidate, Plan
from dreamllm.training.progress import plain_table, say
from dreamllm.workloads import STAGES
from dreamllm.workloads import stage as find_stage
from dreamllm.workloads.stages import PAPER_GPUS

_LIMIT_NAMES = {
    "compute": "arithmetic, at the efficiencies below",
    "memory": "memory bandwidth",
    "measured": "operators as measured",
    "launch": "the host giving out small operators",
    "communication": "communication that nothing hides",
    "waiting": "waiting for the GPU with the longest documents",
}


def show(plan: Plan, console: Console) -> None:
    """Prints the plan: setting, memory, time, what limits it, the paper's figures, and where the figures come from."""
    request, device = plan.request, plan.device
    stage = find_stage(request.stage)
    say(console, f"{stage.kind} ({stage.summary})")
    say(console, f"{request.size} on {request.gpus} x {device.name}, {request.precision}")
    if not plan.time.measured_share:
        say(console, "time is predicted from limits and assumed efficiencies: nothing was measured on this device")
    say(console, "")
    console.print(_setting(plan))
    say(console, "")
    console.print(memory_table(plan))
    say(console, "")
    console.print(time_table(plan))
    say(console, "")
    console.print(_rates(plan))
    say(console, "")
    console.print(_limits(plan))
    if len(plan.considered) > 1:
        say(console, "")
        console.print(_considered(plan))
    say(console, "")
    console.print(_paper(plan))
    for line in beside_the_paper(plan):
        say(console, line)
    say(console, "")
    for line in assumptions(plan):
        say(console, f"- {line}")


def _setting(plan: Plan) -> Table:
    table = plain_table(("setting", "left"), ("", "right"), ("", "left"))
    table.add_row("sharding", plan.sharding, "")
    if plan.filling.documents is None:
        table.add_row("tokens per batch", str(plan.filling.tokens), "per GPU and pass (--batch.tokens)")
        if plan.filling.pictures is not None:
            table.add_row("pictures per batch", str(plan.filling.pictures), "to create, at most (--batch.pictures)")
        table.add_row("documents", f"{plan.load.documents:.1f}", "per pass on average, chosen to fill it")
    else:
        table.add_row("micro-batch", str(plan.filling.documents), "documents per GPU and pass")
    table.add_row("accumulation", str(plan.accumulation), "passes per step")
    table.add_row("global batch", f"{plan.documents_per_step:.0f}", "documents per step")
    table.add_row("tokens", f"{plan.load.tokens:.0f}", f"per pass on average, {plan.largest.tokens:.0f} in the largest")
    table.add_row(
        "pictures", f"{plan.load.pictures:.1f}", f"created per pass, {plan.largest.pictures:.0f} in the largest"
    )
    return table


def memory_table(plan: Plan) -> Table:
    """What the fullest GPU holds at the peak, by kind."""
    table = plain_table(("memory per GPU", "left"), ("GiB", "right"), ("share", "right"))
    total = plan.memory_bytes
    for kind, size in sorted(plan.memory.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{size / GIB:.2f}", f"{100 * size / total:.0f}%")
    table.add_section()
    table.add_row("in all, at the peak", f"{total / GIB:.2f}", "100%")
    table.add_row(
        "can be used", f"{plan.device.usable_bytes / GIB:.2f}", f"{100 * plan.device.usable_bytes / total:.0f}%"
    )
    return table


def time_table(plan: Plan) -> Table:
    """Where a step's time goes, by part of the model."""
    table = plain_table(("time per step", "left"), ("ms", "right"), ("share", "right"))
    step = plan.step_seconds
    rows = {part: plan.accumulation * seconds for part, seconds in plan.time.by_part.items()}
    rows["launch"] = plan.accumulation * max(0.0, plan.time.seconds - sum(plan.time.by_part.values()))
    rows["communication, not hidden"] = plan.accumulation * plan.exposed_seconds
    rows["waiting for the slowest GPU"] = plan.waiting_seconds
    rows["optimiser"] = rows.get("optimiser", 0.0) + plan.update_seconds
    for name, seconds in sorted(rows.items(), key=lambda item: -item[1]):
        if seconds >= 5e-5:
            table.add_row(name, _ms(seconds), f"{100 * seconds / step:.0f}%")
    table.add_section()
    table.add_row("step", _ms(step), "100%")
    return table


def _rates(plan: Plan) -> Table:
    table = plain_table(("throughput", "left"), ("", "right"))
    rates = (
        ("documents per second", f"{plan.documents_per_second:,.2f}"),
        ("tokens per second", f"{plan.tokens_per_second:,.0f}"),
        ("tokens per second and GPU", f"{plan.tokens_per_second / plan.request.gpus:,.0f}"),
        ("share of peak (MFU)", f"{100 * plan.share_of_peak:.1f}%"),
        ("documents", f"{plan.total_documents:,}"),
        ("steps", f"{plan.steps:,}"),
        ("hours", f"{plan.hours:,.2f}"),
        ("GPU-hours", f"{plan.hours * plan.request.gpus:,.0f}"),
    )
    for name, value in rates:
        table.add_row(name, value)
    return table


def _limits(plan: Plan) -> Table:
    table = plain_table(("what limits it", "left"), ("share of step", "right"))
    for name, seconds in plan.limits.items():
        if seconds < 0.001 * plan.step_seconds:
            continue
        table.add_row(_LIMIT_NAMES[name], f"{100 * seconds / plan.step_seconds:.0f}%")
    return table


def _considered(plan: Plan) -> Table:
    table = plain_table(
        ("considered, by estimate", "left"),
        ("a pass holds", "right"),
        ("GiB", "right"),
        ("documents/s", "right"),
        ("", "left"),
    )
    for candidate in plan.considered[:10]:
        chosen = (candidate.sharding, candidate.filling) == (plan.sharding, plan.filling)
        remark = "chosen" if chosen else ("" if candidate.fits else "does not fit")
        memory, speed = candidate.memory_bytes / GIB, candidate.documents_per_second
        table.add_row(candidate.sharding, _held(candidate.filling), f"{memory:.1f}", f"{speed:,.1f}", remark)
    if len(plan.considered) > 10:
        table.add_row(f"and {len(plan.considered) - 10} more", "", "", "", "")
    return table


def _held(filling: Filling) -> str:
    return f"{filling.tokens:,} tokens" if filling.documents is None else _documents(filling.documents)


def _documents(count: int) -> str:
    return f"{count} document{'s' if count > 1 else ''}"


def _paper(plan: Plan) -> Table:
    table = plain_table((f"the paper, {PAPER_GPUS} x A800", "left"), ("hours", "right"), ("GPU-hours", "right"))
    for name, stage in STAGES.items():
        if stage.paper_hours is not None:
            mark = "  <- this stage" if name == find_stage(plan.request.stage).kind else ""
            table.add_row(f"{name}{mark}", f"{stage.paper_hours:.1f}", f"{stage.paper_hours * PAPER_GPUS:,.0f}")
    table.add_row(
        f"this plan, {plan.request.gpus} x {plan.device.key}",
        _hours(plan.hours),
        _hours(plan.hours * plan.request.gpus),
    )
    return table


def beside_the_paper(plan: Plan) -> list[str]:
    """What the paper's hours say about the original, and what the prediction leaves out."""
    share, hours = plan.papers_share_of_peak, find_stage(plan.request.stage).paper_hours
    if share is None:
        return []
    work = plan.original
    return [
        f"The paper's {hours:g} hours would be {100 * share:.1f}% of peak for this plan's work. The original's way "
        f"takes {work.factor:.2f} times the arithmetic (batches of {PAPER_MICRO_BATCH} padded to their longest: "
        f"{work.padding:.2f} times the positions; every layer computed again; logits of all positions): "
        f"{100 * share * work.factor:.1f}% of peak.",
        f"This plan predicts {100 * plan.share_of_peak:.1f}% of peak. What else separates the two is not known from "
        "the paper, which gives neither data volume per hour nor profile. Real runs also lose what is left out here: "
        + "; ".join(LEFT_OUT)
        + ".",
    ]


LEFT_OUT = (
    "waits for data (reading, decoding and transforming pictures on the host)",
    "collectives that slow the kernels they run beside, and links below their rate",
    "host synchronisations (the original reads losses and norms in every step)",
    "checkpoints, evaluation, restarts and slow nodes",
    "efficiencies that are assumed, not measured on this device",
)


def assumptions(plan: Plan) -> list[str]:
    """Where the figures come from."""
    device, share = plan.device, plan.time.measured_share
    lines = [
        "memory: the real training step, run on tensors without contents; the largest of the batches drawn",
        f"reserved of the {device.memory_gib:.1f} GiB: {device.reserved_gib:.1f} GiB for the context, libraries and "
        "what the allocator cannot use",
    ]
    if plan.sharding != "none":
        frozen = f"{plan.layout.spread / 1e6:,.0f} of {plan.layout.frozen / 1e6:,.0f} million frozen parameters divided"
        how = frozen if plan.layout.spread else "frozen parts whole"
        lines.append(f"sharding is computed, not run: states divided, weights gathered in bfloat16, {how}")
    lines.append(f"communication: {plan.traffic.description}")
    if plan.request.gpus > device.gpus_per_node:
        lines.append(
            f"network: {device.network_gb_per_s:g} GB/s per GPU and direction, {device.gpus_per_node} GPUs per node, "
            f"of which collectives reach {100 * LINK_EFFICIENCY:.0f}% (assumed; --network-gb-per-s, --gpus-per-node)"
        )
    if share:
        lines.append(f"time: {100 * share:.0f}% of the operators' time comes from measured records")
    if share < 1:
        limits = ", ".join(f"{kind} {100 * value:.0f}%" for kind, value in device.efficiency.items())
        lines.append(
            f"time: limits of {device.bf16_dense_tflops:.4g} TFLOP/s, "
            f"{device.memory_gb_per_s:.4g} GB/s, of which are reached: {limits}"
        )
        lines += [f"{name}: {source}" for name, source in device.sources.items() if name.startswith("efficiency")]
    if plan.waiting_seconds:
        behind = 100 * plan.waiting_seconds / plan.step_seconds
        lines.append(
            f"the slowest of {plan.request.gpus} GPUs is {behind:.0f}% of a step behind the mean: drawn from the "
            "documents' lengths and pictures; "
            + ("chosen to fill a pass" if plan.filling.documents is None else "documents go to GPUs as they come")
        )
    lines.append("reading and decoding of data is taken to keep up")
    lines.append("layers that are trained are computed again for the gradient, all but their attention")
    return lines


def _as_values(candidate: Candidate) -> dict[str, Any]:
    filling = candidate.filling
    values = {name: value for name, value in vars(candidate).items() if name != "filling"}
    return values | {"micro_batch": filling.documents, "tokens_per_batch": filling.tokens}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _hours(value: float) -> str:
    return f"{value:,.1f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures of the plan: bytes, seconds, shares."""
    request, device = plan.request, plan.device
    stage = find_stage(request.stage)
    return {
        "stage": stage.kind,
        "size": request.size,
        "gpu": device.key,
        "gpu_name": device.name,
        "gpus": request.gpus,
        "precision": request.precision,
        "sharding": plan.sharding,
        "micro_batch": plan.filling.documents,
        "tokens_per_batch": plan.filling.tokens,
        "pictures_per_batch": plan.filling.pictures,
        "accumulation": plan.accumulation,
        "global_batch": plan.documents_per_step,
        "tokens_per_pass": plan.load.tokens,
        "pictures_per_pass": plan.load.pictures,
        "trained_parameters": plan.layout.trained,
        "frozen_parameters": plan.layout.frozen,
        "memory_bytes": plan.memory,
        "memory_bytes_total": plan.memory_bytes,
        "memory_bytes_usable": device.usable_bytes,
        "step_seconds": plan.step_seconds,
        "seconds_by_part": {part: plan.accumulation * seconds for part, seconds in plan.time.by_part.items()},
        "seconds_by_limit": plan.limits,
        "communication_exposed_seconds": plan.accumulation * plan.exposed_seconds,
        "waiting_seconds": plan.waiting_seconds,
        "measured_share_of_time": plan.time.measured_share,
        "flops_per_step_and_gpu": plan.accumulation * plan.flops,
        "documents_per_second": plan.documents_per_second,
        "tokens_per_second": plan.tokens_per_second,
        "share_of_peak": plan.share_of_peak,
        "steps": plan.steps,
        "hours": plan.hours,
        "gpu_hours": plan.hours * request.gpus,
        "paper_hours": stage.paper_hours,
        "paper_gpus": PAPER_GPUS,
        "paper_share_of_peak": plan.papers_share_of_peak,
        "original_work_factor": plan.original.factor,
        "original_padding": plan.original.padding,
        "left_out": list(LEFT_OUT),
        "sources": dict(device.sources),
        "considered": [_as_values(candidate) for candidate in plan.considered],
        "assumptions": assumptions(plan),
    }
