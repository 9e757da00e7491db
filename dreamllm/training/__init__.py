"""Training: stages as typed configurations, and a run that resumes to the same bits."""

from dreamllm.training.bad_batch import load_stored_batch
from dreamllm.training.configuration import (
    STAGE_LOSS_WEIGHTS,
    STAGE_TRAINABLE,
    EmaSettings,
    LoraSettings,
    RunConfig,
    RunSettings,
    StageConfig,
    learning_rate,
)
from dreamllm.training.distributed import Processes, processes
from dreamllm.training.errors import (
    ConfigurationChangedError,
    NonFiniteLossError,
    ProcessLostError,
    SaveError,
    TrainingInterrupted,
)
from dreamllm.training.files import locked, make_folder, write_file, write_folder, write_json, write_text
from dreamllm.training.folder import claim_folder
from dreamllm.training.merge import merge_stage1
from dreamllm.training.metrics import read_metrics
from dreamllm.training.observers import RunObserver
from dreamllm.training.runner import run
from dreamllm.training.stage import stage_batches

__all__ = [
    "STAGE_LOSS_WEIGHTS",
    "STAGE_TRAINABLE",
    "ConfigurationChangedError",
    "EmaSettings",
    "LoraSettings",
    "NonFiniteLossError",
    "ProcessLostError",
    "Processes",
    "RunConfig",
    "RunObserver",
    "RunSettings",
    "SaveError",
    "StageConfig",
    "TrainingInterrupted",
    "claim_folder",
    "learning_rate",
    "load_stored_batch",
    "locked",
    "make_folder",
    "merge_stage1",
    "processes",
    "read_metrics",
    "run",
    "stage_batches",
    "write_file",
    "write_folder",
    "write_json",
    "write_text",
]
