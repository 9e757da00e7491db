"""Training: stages as typed configurations, and a run that resumes to the same bits."""

from dreamllm.training.configuration import (
    STAGE_LOSS_WEIGHTS,
    STAGE_TRAINABLE,
    RunConfig,
    RunSettings,
    StageConfig,
    learning_rate,
)
from dreamllm.training.errors import ConfigurationChangedError, NonFiniteLossError, SaveError, TrainingInterrupted
from dreamllm.training.files import make_folder, write_folder, write_json
from dreamllm.training.folder import claim_folder
from dreamllm.training.metrics import read_metrics
from dreamllm.training.runner import run
from dreamllm.training.stage import load_stored_batch

__all__ = [
    "STAGE_LOSS_WEIGHTS",
    "STAGE_TRAINABLE",
    "ConfigurationChangedError",
    "NonFiniteLossError",
    "RunConfig",
    "RunSettings",
    "SaveError",
    "StageConfig",
    "TrainingInterrupted",
    "claim_folder",
    "learning_rate",
    "load_stored_batch",
    "make_folder",
    "read_metrics",
    "run",
    "write_folder",
    "write_json",
]
