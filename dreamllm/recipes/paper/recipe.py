"""The paper's stages as recipes: `dreamllm train stage2 --model START --data.root DIR --out RUN`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dreamllm.data import Mixture, Part, derive_seed
from dreamllm.model import DreamLLMProcessor
from dreamllm.monitoring import LogSettings, SampleSettings, watching
from dreamllm.planning import peak_flops
from dreamllm.recipes.paper.datasets import DataSettings, open_parts
from dreamllm.recipes.paper.dry_run import SIZE, DryRun, show
from dreamllm.recipes.paper.stages import PAPER_GPUS, BatchSettings, OptimSettings, PaperStage, Variant, find, steps
from dreamllm.training import LoraSettings, RunConfig, RunSettings, StageConfig, stage_batches
from dreamllm.training import run as run_stages
from dreamllm.workloads import make_processor
from dreamllm.workloads import parts as synthetic_parts

PLANNED_BATCHES = 64
"""From which the mean number of documents in a batch is taken."""

DATA, OPTIM, BATCH = DataSettings(), OptimSettings(), BatchSettings()
SAMPLES, LOGS = SampleSettings(), LogSettings()
SETTINGS = RunSettings(precision="bfloat16", sharding="grad_op", workers=8, checkpoint_every=500)


_ARGUMENTS = """
    Args:
        out: folder of the run; the trained model will be in its subfolder model.
        model: folder to start from: what the stage before made, or dreamllm assemble for stage I.
        data: where the data lie.
        optim: changes of the optimisation.
        batch: changes of the batches.
        variant: settings of the paper, or of the original program's released configuration.
        seed: everything random follows from it.
        lora: trains adapters of low rank in the place of the decoder's layers, e.g. --lora.rank 16; not in stage I.
        settings: how the run proceeds on these machines.
        samples: what the model makes of fixed prompts as it learns.
        logs: where metrics go besides the run's own file.
        dry_run: print the resolved plan and train nothing; model, data and out may be left out.
        gpus: GPUs that a dry run plans for.
        gpu: their kind, as in dreamllm plan.
"""


@dataclass(frozen=True)
class _Call:
    name: str
    variant: Variant
    out: Path | None
    model: Path | None
    data: DataSettings
    optim: OptimSettings
    batch: BatchSettings
    seed: int
    settings: RunSettings
    samples: SampleSettings
    logs: LogSettings
    lora: LoraSettings | None = None

    @property
    def stage(self) -> PaperStage:
        return find(self.name, self.variant)

    def documents_per_epoch(self, parts: tuple[Part, ...]) -> int:
        """Of the mixture: the recipe's virtual sizes, or those of one's own parts."""
        return len(Mixture(parts, self.seed)) if self.data.parts else self.stage.documents_per_epoch

    def steps(self, parts: tuple[Part, ...], documents_per_step: float) -> int:
        if self.optim.steps is not None:
            return self.optim.steps
        epochs = self.stage.epochs if self.optim.epochs is None else self.optim.epochs
        return steps(epochs, self.documents_per_epoch(parts), documents_per_step)

    def config(self, parts: tuple[Part, ...], documents_per_step: float | None = None) -> StageConfig:
        """The stage. The mean number of documents of a step is for batches filled by tokens, where it must be found."""
        stage, batch = self.stage, self.batch
        values: dict[str, Any] = {"learning_rate": stage.learning_rate, "flip_targets": stage.flip_targets}
        values |= self.optim.changes() | {"lora": self.lora}
        if batch.tokens is None:
            documents = PAPER_GPUS * stage.documents_per_gpu if batch.documents is None else batch.documents
            per_pass = batch.per_pass or stage.documents_per_gpu
            if documents % per_pass:
                raise ValueError(f"batch.per_pass {per_pass} does not divide the {documents} documents of a step")
            values |= {"documents_per_step": documents, "micro_batches": documents // per_pass}
            documents_per_step = documents
        else:
            values |= {"tokens_per_batch": batch.tokens, "pictures_per_batch": batch.pictures}
            values |= {"look_ahead": batch.look_ahead, "micro_batches": batch.micro_batches or PAPER_GPUS}
        count = 1 if documents_per_step is None else self.steps(parts, documents_per_step)
        return StageConfig(self.name, stage.kind, parts, count, **values)


def _run(call: _Call, dry_run: bool, gpus: int, gpu: str) -> Path | None:
    stage, seed = call.stage, derive_seed(call.seed, call.name)
    missing = [option for option, value in (("--out", call.out), ("--model", call.model)) if value is None]
    if not call.data.given:
        missing.append("--data.root")
    if missing and not dry_run:
        raise ValueError(f"{call.name} needs {', '.join(missing)}; --dry-run shows the plan without them")
    parts = open_parts(call.data, stage, seed) if call.data.given else synthetic_parts(call.name, SIZE)
    config = call.config(parts)
    documents = float(config.documents_per_step or 0)
    if config.tokens_per_batch is not None:
        processor = make_processor(SIZE) if call.model is None else DreamLLMProcessor.from_pretrained(call.model)
        documents = config.micro_batches * documents_per_batch(config, processor, call.seed)
        config = call.config(parts, documents)
    if dry_run:
        epochs = config.steps * documents / call.documents_per_epoch(parts)
        shown = DryRun(call.variant, stage, config, documents, epochs, call.settings, call.data, call.model, gpus, gpu)
        show(shown, Console())
        return None
    assert call.out is not None
    assert call.model is not None
    run = RunConfig(call.model, (config,), call.out, call.seed, call.settings)
    return run_stages(run, Console(), watching(call.out, call.samples, call.logs, run.describe()), peak_flops)


def documents_per_batch(config: StageConfig, processor: DreamLLMProcessor, seed: int) -> float:
    """How many documents a batch of `config.tokens_per_batch` holds, by planning the first ones of a run."""
    batches = stage_batches(config, processor, seed)
    plans = itertools.islice(batches.plans(0, config.micro_batches), PLANNED_BATCHES)
    return statistics.mean(len(plan.positions) for plan in plans)


def _recipe(name: str, summary: str) -> Callable[..., Path | None]:
    """The function behind `dreamllm train NAME`; all stages take the same options."""

    def train(
        out: Path | None = None,
        model: Path | None = None,
        data: DataSettings = DATA,
        optim: OptimSettings = OPTIM,
        batch: BatchSettings = BATCH,
        variant: Variant = "paper",
        seed: int = 42,
        lora: LoraSettings | None = None,
        settings: RunSettings = SETTINGS,
        samples: SampleSettings = SAMPLES,
        logs: LogSettings = LOGS,
        dry_run: bool = False,
        gpus: int = PAPER_GPUS,
        gpu: str = "a800",
    ) -> Path | None:
        call = _Call(name, variant, out, model, data, optim, batch, seed, settings, samples, logs, lora)
        return _run(call, dry_run, gpus, gpu)

    train.__name__ = train.__qualname__ = name
    train.__doc__ = f"{summary}\n{_ARGUMENTS}"
    return train


stage1 = _recipe("stage1", "Stage I of the paper, both halves at once: projectors and dream queries, on 30M pairs.")
stage1_comprehension = _recipe(
    "stage1_comprehension", "The half of stage I that reads pictures: trains the visual projector."
)
stage1_creation = _recipe(
    "stage1_creation", "The half of stage I that creates pictures: trains dream queries and condition projector."
)
stage2 = _recipe("stage2", "Stage II of the paper: all but the vision models, on interleaved documents and pairs.")
stage3 = _recipe("stage3", "Stage III of the paper: instructions, conversations and requests to draw.")
