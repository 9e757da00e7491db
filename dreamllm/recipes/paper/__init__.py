"""The paper's three stages at full size, on its datasets."""

from dreamllm.recipes.paper.datasets import DATASETS, DataSettings, PartSettings
from dreamllm.recipes.paper.recipe import stage1, stage1_comprehension, stage1_creation, stage2, stage3
from dreamllm.recipes.paper.stages import BatchSettings, OptimSettings, Variant

__all__ = [
    "DATASETS",
    "BatchSettings",
    "DataSettings",
    "OptimSettings",
    "PartSettings",
    "Variant",
    "stage1",
    "stage1_comprehension",
    "stage1_creation",
    "stage2",
    "stage3",
]
