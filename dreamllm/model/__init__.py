"""The model: configuration, processor, DreamLLM itself, and checkpoints in our and the original's layout."""

from dreamllm.model.assemble import AssembleOptions, assemble
from dreamllm.model.configuration import DreamLLMConfig
from dreamllm.model.diffusion import DiffusionDraws
from dreamllm.model.memory import RECOMPUTE, Recompute
from dreamllm.model.modeling import PARAMETER_GROUPS, DreamLLM, DreamLLMOutput
from dreamllm.model.original import convert_from_original, convert_to_original, load_original, save_original
from dreamllm.model.processor import DreamLLMProcessor, ProcessorSettings
from dreamllm.model.weights import CheckpointError

__all__ = [
    "PARAMETER_GROUPS",
    "RECOMPUTE",
    "AssembleOptions",
    "CheckpointError",
    "DiffusionDraws",
    "DreamLLM",
    "DreamLLMConfig",
    "DreamLLMOutput",
    "DreamLLMProcessor",
    "ProcessorSettings",
    "Recompute",
    "assemble",
    "convert_from_original",
    "convert_to_original",
    "load_original",
    "save_original",
]
