"""Recipe `digits`: components, stages I to III, evaluation on unseen scans and a report, in minutes on a CPU."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dreamllm.data import Part, derive_seed
from dreamllm.evaluation.digits import EVALUATION, TARGETS, DigitsEvaluation, evaluate_digits
from dreamllm.evaluation.digits_judge import DigitsJudge
from dreamllm.evaluation.digits_scans import Scans, load_scans
from dreamllm.evaluation.report import EVALUATION_FOLDER, write_report
from dreamllm.inference import load
from dreamllm.model import AssembleOptions
from dreamllm.planning import peak_flops
from dreamllm.recipes.components import write_start
from dreamllm.recipes.digits import documents
from dreamllm.recipes.digits.components import ComponentConfig, pretrain_components
from dreamllm.recipes.digits.examples import write_examples
from dreamllm.training import RunConfig, RunSettings, StageConfig, claim_folder, make_folder, processes
from dreamllm.training import run as run_stages
from dreamllm.training.progress import quiet_transformers, say

DRAWING = {"scheduler": "ddim", "steps": 25, "guidance_scale": 1.25}
"""How the model recommends drawing: a small UNet on small pictures needs few steps and little guidance."""

SETTINGS = RunSettings(checkpoint_every=100)
"""Stages are short, so checkpoints are frequent."""


@dataclass(frozen=True)
class DigitsConfig:
    """The numbers of the recipe.

    `num_dream_queries`: queries per picture. `steps_*`, `rate_*`: optimiser steps and peak learning rate of each
    stage. `warmup_ratio`: share of each stage in which the rate rises.
    """

    num_dream_queries: int = 4
    steps_comprehension: int = 300
    steps_creation: int = 300
    steps_interleaved: int = 250
    steps_instructions: int = 250
    rate_joints: float = 5e-3
    rate_interleaved: float = 1e-3
    rate_instructions: float = 7e-4
    warmup_ratio: float = 0.05


def run(
    out: Path,
    seed: int = 42,
    scale: float = 1.0,
    micro_batches: int | None = None,
    settings: RunSettings = SETTINGS,
) -> Path:
    """Trains a small DreamLLM on scanned digits, evaluates it and writes a report: minutes on a CPU.

    Components (language model, vision encoder, picture decoder) are made first in `out/components`; stages I to III
    train exactly the parameters of the stage table; then captions, drawing and counting are measured on the 297 scans
    never seen, and `out/report.html` shows everything. What is complete in `out` is kept, so the same call resumes.
    Started by torchrun, the main process prepares and evaluates and all share the training; `out` must be a folder
    that all see. Returns the model's folder, `out/model`.

    Args:
        out: folder of the run; the trained model will be in its subfolder model.
        seed: everything random follows from it.
        scale: multiplies all numbers of steps.
        micro_batches: passes that share a step, over all processes; by default one for each process.
        settings: how the run proceeds on this machine.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    started = time.perf_counter()
    config, components = DigitsConfig(), ComponentConfig(seed=seed, scale=scale)
    train, unseen = load_scans()
    with processes(settings.device, grouped=settings.sharding != "none") as these:
        lanes = micro_batches or these.world
        these.lanes(lanes)
        console = Console(quiet=not these.main)

        def prepare() -> Path:
            make_folder(out)
            arguments = {"recipe": "digits", "seed": seed, "scale": scale, "micro_batches": lanes, **asdict(config)}
            arguments["components"] = asdict(components)
            claim_folder(out / "recipe.json", arguments, say=lambda text: say(console, text))
            with quiet_transformers():
                say(console, "components: a language model, a vision encoder and a picture decoder, each on its own")
                pretrain_components(out / "components", components, console)
                options = AssembleOptions(
                    num_dream_queries=config.num_dream_queries, template="plain", config={"drawing": DRAWING}
                )
                return write_start(out / "start", out / "components", options, seed)

        start = these.prepare(prepare)
        say(console, "stages I to III: the components stay as they are, except the language model from stage II on")
        run_config = RunConfig(start, stages(train, config, seed, scale, lanes), out, seed, settings)
        model = run_stages(run_config, console, peak=peak_flops)

        def judge() -> None:
            write_examples(model, unseen)
            evaluation = evaluate(model, train, unseen, out, console)
            report = write_report(out)
            _summarise(evaluation, report, model, time.perf_counter() - started, console)

        these.prepare(judge)
    return model


def stages(
    train: Scans, config: DigitsConfig, seed: int, scale: float, micro_batches: int = 1
) -> tuple[StageConfig, ...]:
    """The four stages; the halves of stage I run one after the other, as in the original program."""

    def part(make: documents.Maker, weight: float) -> Part:
        reader = documents.RandomDocuments(make.__name__, make, train, derive_seed(seed, "documents"))
        return Part(reader, weight=weight)

    def steps(count: int) -> int:
        return max(1, round(count * scale))

    reading, drawing = part(documents.reading_pair, 1), part(documents.drawing_pair, 1)
    counting, instructions = part(documents.counting_document, 1), part(documents.instruction, 3)
    common: dict[str, Any] = {"warmup_ratio": config.warmup_ratio, "micro_batches": micro_batches}
    return (
        StageConfig(
            "stage1-comprehension", "stage1_comprehension", (reading,), steps(config.steps_comprehension),
            documents_per_step=32, learning_rate=config.rate_joints, **common,
        ),
        StageConfig(
            "stage1-creation", "stage1_creation", (drawing,), steps(config.steps_creation),
            documents_per_step=32, learning_rate=config.rate_joints, **common,
        ),
        StageConfig(
            "stage2", "stage2", (counting, reading, drawing), steps(config.steps_interleaved),
            documents_per_step=36, learning_rate=config.rate_interleaved, **common,
        ),
        StageConfig(
            "stage3", "stage3", (instructions, counting, reading, drawing), steps(config.steps_instructions),
            documents_per_step=30, learning_rate=config.rate_instructions, **common,
        ),
    )  # fmt: skip


def evaluate(model: Path, train: Scans, unseen: Scans, out: Path, console: Console) -> DigitsEvaluation:
    """Measures the model on `unseen` with a judge trained on `train`; results and samples go to `out/evaluation`."""
    judge = DigitsJudge(train.pictures, train.labels)
    with quiet_transformers():
        assistant = load(model, batch_size=EVALUATION.batch_size)
        evaluation = evaluate_digits(assistant, unseen.pictures, unseen.labels, judge, EVALUATION, console)
    evaluation.save(out / EVALUATION_FOLDER)
    return evaluation


def _summarise(evaluation: DigitsEvaluation, report: Path, model: Path, seconds: float, console: Console) -> None:
    results = evaluation.results.to_json()
    say(console, f"\n{evaluation.results}")
    for name, target in TARGETS.items():
        verdict = "reached" if results[name]["reached"] else "NOT reached"
        say(console, f"{name}: {results[name]['share']:.3f}, target {target:.2f} {verdict}")
    threads = torch.get_num_threads()
    say(console, f"\n{seconds / 60:.1f} minutes on {threads} threads")
    say(console, f"  report   {report}")
    say(console, f"  results  {report.parent / EVALUATION_FOLDER / 'digits.json'}")
    say(console, f"  model    {model}")
    say(
        console, f'  try      dreamllm generate --model {model} "Count from two to five with pictures." --out page.html'
    )
