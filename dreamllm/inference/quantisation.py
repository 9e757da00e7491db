"""A language model's weights in eight bits, by torchao."""

from __future__ import annotations

from typing import Any

from torch import nn

from dreamllm.model import DreamLLM


def quantise_weights(model: DreamLLM) -> int:
    """Stores the projections of the decoder's layers as int8, one scale per output. Returns how many there were.

    A row w becomes s round(w / s) with s = max |w| / 127, so an output moves by at most s / 2 times the sum of |x|, and
    rounding. That takes half the memory of bfloat16, and on a GPU up to half the time of writing, which is limited by
    reading the weights. Embeddings, head, projectors, CLIP and the image decoder stay as they are. The model can no
    longer be trained or saved. Not exact, so it happens only where it is asked for.

    Raises `ImportError` that says how to install torchao where it is missing, and `ValueError` where a weight is
    trained or no longer a plain matrix.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("int8 weights need torchao: pip install 'dreamkernels[int8]'") from error
    decoder: Any = model.decoder
    linears = [module for layer in decoder.layers for module in layer.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        if linear.weight.requires_grad:
            raise ValueError("int8 weights cannot be trained; call model.requires_grad_(False) first")
        if type(linear.weight) is not nn.Parameter:
            raise ValueError(f"a weight is a {type(linear.weight).__name__} already; quantise a model once")
    chosen = set(map(id, linears))
    quantize_(decoder, Int8WeightOnlyConfig(), filter_fn=lambda module, name: id(module) in chosen)
    return len(linears)
