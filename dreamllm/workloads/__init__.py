"""Reference workloads: model sizes and the stages of the paper on synthetic documents, for measuring and planning."""

from dreamllm.workloads.documents import DOCUMENT_KINDS, PROMPT_KINDS, SyntheticDocuments
from dreamllm.workloads.sizes import SIZES, made_with, make_model, make_processor, model_config, model_size
from dreamllm.workloads.stages import STAGES, Stage, parts, stage, stage_config

__all__ = [
    "DOCUMENT_KINDS",
    "PROMPT_KINDS",
    "SIZES",
    "STAGES",
    "Stage",
    "SyntheticDocuments",
    "made_with",
    "make_model",
    "make_processor",
    "model_config",
    "model_size",
    "parts",
    "stage",
    "stage_config",
]
