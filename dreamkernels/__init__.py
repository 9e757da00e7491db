"""dreamkernels: fast, tested operators for LLaMA-style models and diffusion UNets.

    y = dreamkernels.rms_norm(x, weight, eps=1e-6)

`python -m dreamkernels info` says what runs here, and how.
"""

from dreamkernels import libraries, ops
from dreamkernels.conditioning import ConditionLayer, ConditionWeights, DreamCondition, condition_kv
from dreamkernels.folded_conditioning import (
    FoldedCondition,
    fold_condition,
    folded_cross_conditioning,
    folding_pays,
)
from dreamkernels.graphs import GraphedCalls, addresses_of, bucket_of
from dreamkernels.libraries import MissingLibraryWarning, build_information
from dreamkernels.ops import (
    StepSchedule,
    UnsupportedScheduler,
    add_noise,
    append_kv,
    attention,
    cross_conditioning,
    decode_attention,
    decode_layers,
    diffusion_loss,
    explain,
    few_rows_linear,
    geglu,
    group_norm_silu,
    guided_step,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    rotary_tables,
    softmax_groups_,
    splice_embeddings,
    step_schedule,
    swiglu,
    swiglu_packed,
)
from dreamkernels.ops.operator import FallbackWarning
from dreamkernels.packing import pack_sequences
from dreamkernels.pictures import resize_crop, resizes_pictures
from dreamkernels.version import __version__

libraries.load()

__all__ = [
    "ConditionLayer",
    "ConditionWeights",
    "DreamCondition",
    "FallbackWarning",
    "FoldedCondition",
    "GraphedCalls",
    "MissingLibraryWarning",
    "StepSchedule",
    "UnsupportedScheduler",
    "__version__",
    "add_noise",
    "addresses_of",
    "append_kv",
    "attention",
    "bucket_of",
    "build_information",
    "condition_kv",
    "cross_conditioning",
    "decode_attention",
    "decode_layers",
    "diffusion_loss",
    "explain",
    "few_rows_linear",
    "fold_condition",
    "folded_cross_conditioning",
    "folding_pays",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "linear_cross_entropy",
    "ops",
    "pack_sequences",
    "resize_crop",
    "resizes_pictures",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "softmax_groups_",
    "splice_embeddings",
    "step_schedule",
    "swiglu",
    "swiglu_packed",
]
