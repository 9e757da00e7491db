"""The datasets of the paper and of the original program's configurations, and where a run looks for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamllm.data import KINDS, Part, Reader, make_reader, open_data
from dreamllm.recipes.paper.stages import PaperStage

SIMILARITY = 0.25
"""Least CLIP similarity of an interleaved document's picture to its sentence (the paper, section 4)."""


@dataclass(frozen=True)
class Dataset:
    """`kind`: of its reader (see `dreamllm.data.make_reader`), with these `options`. `about`: for people."""

    kind: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)


DATASETS: dict[str, Dataset] = {
    "laion400m": Dataset("pair_tars", "LAION-400M, 11M of them in the paper"),
    "laion400m_orig": Dataset("pair_tars", "LAION-400M in original sizes"),
    "laion_coco": Dataset("pair_tars", "LAION with synthetic captions"),
    "blip_laion": Dataset("pair_tars", "LAION with BLIP's captions"),
    "llava_pretrain": Dataset("conversations", "LLaVA's 558K captioned pictures"),
    "gqa": Dataset("conversations", "GQA's questions as conversations"),
    "mmc4_core": Dataset("interleaved_tars", "MMC4-core", {"filters": {"min_similarity": SIMILARITY}}),
    "llava_instruct_filter": Dataset("conversations", "LLaVA's instructions, 80K of them"),
    "llavav1.5_instruct": Dataset("conversations", "LLaVA-1.5's 665K instructions"),
    "mmc4_instruct": Dataset("instructions", "MMC4 documents with instructions that ask for them"),
    "instruct_blip_laion": Dataset("conversations", "requests to draw BLIP-LAION's captions"),
}
"""Spec C.1 to C.3. A dataset is a folder of its name under `DataSettings.root`."""


@dataclass(frozen=True)
class PartSettings:
    """One part of a mixture, by hand.

    Attributes:
        path: folder or file of the data.
        kind: of the reader, see `dreamllm.data.make_reader`; None: recognised by what `path` holds.
        size: virtual size, samples per epoch, e.g. 558000, "558K" or "20M"; None: the real length.
        options: of the reader, e.g. {filters: {min_similarity: 0.25}}.
    """

    path: Path
    kind: str | None = None
    size: int | str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """Where the data of a paper stage lie.

    Attributes:
        root: folder with one subfolder per dataset, named as in the recipe (shown by --dry-run).
        folders: other places of single datasets, by name.
        parts: a mixture of your own in place of the recipe's.
    """

    root: Path | None = None
    folders: dict[str, Path] = field(default_factory=dict)
    parts: list[PartSettings] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = set(self.folders) - set(DATASETS)
        if unknown:
            raise ValueError(f"data.folders names unknown datasets {', '.join(sorted(unknown))}; known: {_known()}")
        if self.parts and (self.root is not None or self.folders):
            raise ValueError("data.parts takes the place of data.root and data.folders; give one or the other")

    @property
    def given(self) -> bool:
        return bool(self.parts or self.root is not None or self.folders)

    def path(self, name: str) -> Path | None:
        """Where dataset `name` is looked for; None when nothing says so."""
        if name in self.folders:
            return Path(self.folders[name])
        return None if self.root is None else self.root / name


def open_parts(data: DataSettings, stage: PaperStage, seed: int) -> tuple[Part, ...]:
    """The mixture: the stage's datasets with their virtual sizes, or `data.parts`.

    Raises `ValueError` that names every dataset that is missing and where it was looked for.
    """
    if data.parts:
        return tuple(Part(_reader(part.kind, part.path, part.options, stage, seed), part.size) for part in data.parts)
    wanted = {name: data.path(name) for name in stage.sizes}
    missing = [f"  {name}: {path or 'no place named'}" for name, path in wanted.items() if not (path and path.exists())]
    if missing:
        raise ValueError(
            "these datasets were not found (--data.root, --data.folders, or --data.parts for a mixture of your own):\n"
            + "\n".join(missing)
        )
    return tuple(
        Part(_reader(DATASETS[name].kind, path, DATASETS[name].options, stage, seed), stage.sizes[name])
        for name, path in wanted.items()
        if path is not None
    )


def _reader(kind: str | None, path: Path, options: Mapping[str, Any], stage: PaperStage, seed: int) -> Reader:
    """What the stage says, unless `options` say otherwise: its direction, its filters, the seed of what is drawn."""
    if kind is None:
        if options or stage.filters:
            raise ValueError(f"data.parts: {path} needs a kind, one of {', '.join(KINDS)}, to take options and filters")
        return open_data(path, stage.mode, seed)
    known = inspect.signature(KINDS[kind]).parameters if kind in KINDS else {}  # make_reader names what is known
    interleaved = "mode" in known and "seed" not in known
    usual = {"mode": "joint" if interleaved and stage.mode == "both" else stage.mode, "seed": seed}
    filters = {**options.get("filters", {}), **stage.filters}
    given = {name: value for name, value in usual.items() if name in known} | dict(options)
    return make_reader(kind, path, **(given | {"filters": filters} if filters else given))


def _known() -> str:
    return ", ".join(DATASETS)
