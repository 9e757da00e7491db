"""What a stage would do, without doing it: data, parameters, steps, memory and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dreamllm.data import parse_size
from dreamllm.model import DreamLLM, DreamLLMConfig
from dreamllm.planning import (
    DoesNotFitError,
    Plan,
    Request,
    assumptions,
    find_device,
    make_plan,
    memory_table,
    time_table,
)
from dreamllm.recipes.paper.datasets import DATASETS, DataSettings
from dreamllm.recipes.paper.stages import PAPER_GPUS, PaperStage, Variant
from dreamllm.training import RunSettings, StageConfig
from dreamllm.training.lora import add_adapters
from dreamllm.training.progress import plain_table, quiet_transformers, say
from dreamllm.workloads import model_config

SIZE, PAPER_MODEL = "7b", "not given; figures are for the paper's 7B"


@dataclass(frozen=True)
class DryRun:
    """A stage with everything resolved. `model` is None for the paper's 7B; `documents_per_step` may be a mean."""

    variant: Variant
    stage: PaperStage
    config: StageConfig
    documents_per_step: float
    epochs: float
    settings: RunSettings
    data: DataSettings
    model: Path | None
    gpus: int
    gpu: str

    def __post_init__(self) -> None:
        lanes = self.config.micro_batches
        if self.gpus < 1 or lanes % self.gpus:
            allowed = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
            raise ValueError(
                f"{self.gpus} GPUs cannot share the {lanes} micro-batches of a step; {', '.join(allowed)} can "
                "(--batch.documents, --batch.per-pass)"
            )

    @property
    def documents_per_pass(self) -> float:
        return self.documents_per_step / self.config.micro_batches


def show(run: DryRun, console: Console) -> None:
    """Prints the resolved plan."""
    with quiet_transformers():
        config = model_config(SIZE) if run.model is None else DreamLLMConfig.from_pretrained(run.model)
        say(console, f"{run.config.name} ({run.stage.summary}), variant {run.variant}")
        say(console, f"start: {run.model or PAPER_MODEL}")
        for table in (_data(run), _parameters(run, config), _steps(run), _changed(run.settings)):
            say(console, "")
            console.print(table)
        say(console, "")
        _memory_and_time(run, config, console)


def _data(run: DryRun) -> Table:
    table = plain_table(
        ("data", "left"),
        ("per epoch", "right"),
        ("share", "right"),
        ("documents", "right"),
        ("kind", "left"),
        ("where", "fold"),
    )
    parts = run.config.data if run.data.given else ()
    if run.data.parts:
        sizes = [len(part.reader) if part.size is None else parse_size(part.size) for part in parts]
        rows = [(p.path.name, p.kind or "recognised", str(p.path)) for p in run.data.parts]
    else:
        sizes = list(run.stage.sizes.values())
        places = {name: run.data.path(name) for name in run.stage.sizes}
        rows = [(name, DATASETS[name].kind, str(path or f"ROOT/{name}")) for name, path in places.items()]
    total = sum(sizes)
    for number, (size, (name, kind, where)) in enumerate(zip(sizes, rows, strict=True)):
        found = f"{len(parts[number].reader):,}" if parts else "not looked for"
        table.add_row(name, f"{size:,}", f"{100 * size / total:.1f}%", found, kind, where)
    return table


def _parameters(run: DryRun, config: DreamLLMConfig) -> Table:
    table = plain_table(("parameters", "left"), ("million", "right"), ("", "left"))
    with torch.device("meta"):
        model = DreamLLM(config)
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in model.parameter_groups().items()}
    trains = {name: count for name, count in counts.items() if name in run.config.groups}
    if run.config.lora is not None:
        del trains["language_model"]
        before = counts["language_model"]
        add_adapters(model, run.config.lora, seed=0)
        trains["adapters"] = sum(p.numel() for p in model.parameter_groups()["language_model"]) - before
    for name, count in (counts | trains).items():
        table.add_row(name, f"{count / 1e6:,.2f}", "trained" if name in trains else "frozen")
    counts, trained = counts | trains, sum(trains.values())
    table.add_section()
    table.add_row("in all", f"{sum(counts.values()) / 1e6:,.2f}", f"{trained / 1e6:,.2f} trained")
    return table


def _steps(run: DryRun) -> Table:
    config = run.config
    table = plain_table(("training", "left"), ("value", "right"), ("", "left"))
    warmup = math.ceil(config.steps * config.warmup_ratio)
    lm, vm = config.weights
    packed = config.tokens_per_batch is not None
    held = f"of {config.tokens_per_batch:,} tokens" if packed else f"of {run.documents_per_pass:.0f} documents"
    rows: list[tuple[str, Any, str]] = [
        ("documents per step", f"{run.documents_per_step:,.0f}", "on average" if packed else ""),
        ("micro-batches", config.micro_batches, held),
        ("passes per GPU", config.micro_batches // run.gpus, f"on {run.gpus} GPUs"),
        ("steps", f"{config.steps:,}", f"{run.epochs:.2f} epochs"),
        ("learning rate", f"{config.learning_rate:g}", f"{warmup} steps of warm-up, then cosine to 0"),
        ("weight decay", f"{config.weight_decay:g}", f"AdamW, betas {config.betas}, eps {config.eps:g}"),
        ("gradient norm", f"{config.max_grad_norm:g}", "at most"),
        ("loss weights", f"{lm:g} : {vm:g}", "language : diffusion"),
        ("mirrored targets", "half" if config.flip_targets else "none", ""),
        ("condition dropout", f"{config.condition_dropout:g}", ""),
    ]
    for name, value, note in rows:
        table.add_row(name, str(value), note)
    return table


def _changed(settings: RunSettings) -> Table:
    table = plain_table(("settings", "left"), ("value", "right"), ("", "left"))
    plain = RunSettings()
    for name in (f.name for f in fields(settings)):
        value = getattr(settings, name)
        table.add_row(name, str(value), "" if value == getattr(plain, name) else f"default {getattr(plain, name)}")
    return table


def _memory_and_time(run: DryRun, config: DreamLLMConfig, console: Console) -> None:
    """By the planner, which knows the paper's size on its mixture."""
    if _shape(config) != _shape(model_config(SIZE)):
        say(console, "memory and time: the planner knows the 7B only; measure this size with dreamllm profile")
        return
    stage, settings = run.config, run.settings
    packed = stage.tokens_per_batch is not None
    request = Request(
        stage.kind,
        SIZE,
        run.gpus,
        settings.precision,
        global_batch=round(run.documents_per_step),
        micro_batch=None if packed else round(run.documents_per_pass),
        sharding="none" if run.gpus == 1 else settings.sharding,
        shard_frozen_above_mib=settings.shard_frozen_above_mib,
        tokens_per_batch=stage.tokens_per_batch,
        pictures_per_batch=stage.pictures_per_batch,
        passes=stage.micro_batches // run.gpus if packed else None,
        lora=stage.lora,
    )
    try:
        plan = make_plan(request, find_device(run.gpu, None))
    except DoesNotFitError as error:
        say(console, f"does not fit: {error}")
        return
    say(console, f"on {run.gpus} x {plan.device.name}; predicted, nothing was measured on this device")
    for table in (memory_table(plan), time_table(plan), _length(run, plan)):
        say(console, "")
        console.print(table)
    say(console, "")
    for line in assumptions(plan):
        say(console, f"- {line}")


def _length(run: DryRun, plan: Plan) -> Table:
    table = plain_table(("the whole stage", "left"), ("value", "right"), ("", "left"))
    hours = run.config.steps * plan.step_seconds / 3600
    tokens = plan.load.tokens * run.config.micro_batches
    table.add_row("tokens", f"{tokens * run.config.steps / 1e9:,.1f} G", f"{tokens:,.0f} per step on average")
    table.add_row(
        "pictures created", f"{plan.load.pictures * run.config.micro_batches * run.config.steps / 1e6:,.1f} M", ""
    )
    paper = "" if run.stage.paper_hours is None else f"the paper: {run.stage.paper_hours:g} on {PAPER_GPUS} A800"
    table.add_row("hours", f"{hours:,.1f}", paper)
    table.add_row("GPU-hours", f"{hours * run.gpus:,.0f}", f"{100 * plan.share_of_peak:.1f}% of peak")
    return table


def _shape(config: DreamLLMConfig) -> tuple[int, ...]:
    text = config.text_config
    return text.hidden_size, text.num_hidden_layers, text.intermediate_size, config.num_dream_queries
