"""torch.nn modules over the operators, with the parameter names of the modules that they replace."""

from dreamkernels.nn.geglu import GEGLU
from dreamkernels.nn.group_norm_silu import GroupNormSiLU
from dreamkernels.nn.layer_norm import LayerNorm
from dreamkernels.nn.linear_cross_entropy import LinearCrossEntropyLoss
from dreamkernels.nn.rms_norm import RMSNorm
from dreamkernels.nn.rotary import RotaryEmbedding
from dreamkernels.nn.swiglu import SwiGLU

__all__ = ["GEGLU", "GroupNormSiLU", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm", "RotaryEmbedding", "SwiGLU"]
