"""The paper's stages as workloads: what is trained on how many documents of which kind (spec C.1, D.1, D.2)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dreamllm.data import Part, derive_seed
from dreamllm.training import StageConfig
from dreamllm.training.configuration import StageKind
from dreamllm.workloads.documents import SyntheticDocuments
from dreamllm.workloads.sizes import model_size

PAPER_GPUS = 128
"""A800 with 80 GB, on which `Stage.paper_hours` were reported."""


@dataclass(frozen=True)
class Stage:
    """One stage: `documents` are the kinds of document and how many of each an epoch holds."""

    kind: StageKind
    summary: str
    documents: tuple[tuple[str, int], ...]
    epochs: int
    learning_rate: float
    paper_hours: float | None

    @property
    def total_documents(self) -> int:
        return self.epochs * sum(count for _, count in self.documents)


STAGES: dict[str, Stage] = {
    "stage1": Stage(
        "stage1", "alignment: pairs in both directions, projectors and queries", (("pair", 30_000_000),), 1, 2e-3, 6.0
    ),
    "stage1_comprehension": Stage(
        "stage1_comprehension",
        "the half of alignment that reads pictures",
        (("comprehension pair", 15_000_000),),
        1,
        2e-3,
        None,
    ),
    "stage1_creation": Stage(
        "stage1_creation",
        "the half of alignment that creates pictures",
        (("creation pair", 15_000_000),),
        1,
        2e-3,
        None,
    ),
    "stage2": Stage(
        "stage2",
        "interleaved generative pre-training: documents and pairs, the language model too",
        (("interleaved", 2_000_000), ("pair", 2_000_000)),
        1,
        2e-5,
        10.0,
    ),
    "stage3": Stage(
        "stage3",
        "instructions: conversations, interleaved answers, drawing",
        (("conversation", 80_000), ("interleaved order", 20_000), ("drawing order", 20_000)),
        3,
        4e-5,
        1.5,
    ),
}


def stage(name: str) -> Stage:
    """Looks a stage up; "1", "2" and "3" are understood. Raises `ValueError` listing the known ones."""
    full = name if name in STAGES else f"stage{name}"
    if full in STAGES:
        return STAGES[full]
    near = difflib.get_close_matches(name, STAGES, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    known = "".join(f"\n  {known}: {entry.summary}" for known, entry in STAGES.items())
    raise ValueError(f"unknown stage {name!r}.{meant} Known stages:{known}")


def parts(name: str, size: str, seed: int = 0) -> tuple[Part, ...]:
    """The stage's mixture of synthetic documents."""
    return tuple(
        Part(SyntheticDocuments(kind, size, count, derive_seed(seed, name))) for kind, count in stage(name).documents
    )


def stage_config(
    name: str, size: str, documents_per_step: int | None = None, steps: int = 100, micro_batches: int = 1, seed: int = 0
) -> StageConfig:
    """The stage as training runs it, on synthetic documents; by default as many per step as suit the size."""
    chosen = stage(name)
    return StageConfig(
        name,
        chosen.kind,
        parts(name, size, seed),
        steps,
        learning_rate=chosen.learning_rate,
        documents_per_step=(
            model_size(size).documents_per_step * micro_batches if documents_per_step is None else documents_per_step
        ),
        micro_batches=micro_batches,
    )
