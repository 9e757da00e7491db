"""The operators. One subpackage per family: public function, schema, reference, Triton; C++ is under csrc/."""

from dreamkernels.ops.append_kv import append_kv
from dreamkernels.ops.attention import attention
from dreamkernels.ops.cross_conditioning import cross_conditioning
from dreamkernels.ops.decode_attention import decode_attention
from dreamkernels.ops.decode_layers import decode_layers, few_rows_linear
from dreamkernels.ops.diffusion_loss import add_noise, diffusion_loss
from dreamkernels.ops.explanation import explain
from dreamkernels.ops.geglu import geglu
from dreamkernels.ops.group_norm_silu import group_norm_silu
from dreamkernels.ops.guided_step import StepSchedule, UnsupportedScheduler, guided_step, step_schedule
from dreamkernels.ops.layer_norm import layer_norm
from dreamkernels.ops.linear_cross_entropy import linear_cross_entropy
from dreamkernels.ops.rms_norm import rms_norm
from dreamkernels.ops.rotary import rotary, rotary_tables
from dreamkernels.ops.softmax_groups import softmax_groups_
from dreamkernels.ops.splice_embeddings import splice_embeddings
from dreamkernels.ops.swiglu import swiglu, swiglu_packed

__all__ = [
    "StepSchedule",
    "UnsupportedScheduler",
    "add_noise",
    "append_kv",
    "attention",
    "cross_conditioning",
    "decode_attention",
    "decode_layers",
    "diffusion_loss",
    "explain",
    "few_rows_linear",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "softmax_groups_",
    "splice_embeddings",
    "step_schedule",
    "swiglu",
    "swiglu_packed",
]
