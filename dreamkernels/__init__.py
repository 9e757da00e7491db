"""dreamkernels: fast, tested operators for LLaMA-style models and diffusion UNets."""

from dreamkernels.version import __version__

__all__ = ["__version__"]
