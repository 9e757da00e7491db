"""torch.nn modules over the operators, with the parameter names of the modules that they replace."""

from dreamkernels.nn.rms_norm import RMSNorm

__all__ = ["RMSNorm"]
