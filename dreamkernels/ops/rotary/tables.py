"""Tables of cosines and sines for rotary, with the scalings of LLaMA models."""

from __future__ import annotations

import torch

SCALINGS = (None, "linear", "dynamic")


def rotary_tables(
    length: int,
    dim: int,
    base: float = 10000.0,
    scaling: str | None = None,
    factor: float = 1.0,
    original_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the positions 0 to length - 1, as `rotary` takes them.

    Channel pair i turns by the angle m / base^(2 i / dim) at position m (Su et al., RoFormer, 2021, section 3.4.2).
    Both halves of the last dimension hold the same angles. They are computed in float32, whatever the dtype, in the
    order of transformers' LlamaRotaryEmbedding, and equal its tables.

    Args:
        length: number of positions.
        dim: rotated channels, even; the width of a head, or less.
        base: `rope_theta`.
        scaling: None; "linear": positions are divided by `factor`; "dynamic" (NTK-aware): for a length L above
            `original_length` L0 the base becomes base * (factor L / L0 - factor + 1)^(dim / (dim - 2)), for others it
            stays.
        factor: scaling factor, at least 1; only with a scaling.
        original_length: positions that the model was trained with; needed by "dynamic", and only by it.

    Returns:
        (cos, sin), each [length, dim] of the given dtype.

    Raises:
        ValueError: a value is out of range, or an argument has no effect with the chosen scaling.
    """
    _check(length, dim, base, scaling, factor, original_length)
    if scaling == "dynamic" and original_length is not None and length > original_length:
        stretch = factor * length / original_length - (factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequency = 1.0 / base**exponent
    if scaling == "linear":
        frequency = frequency / factor
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _check(length: int, dim: int, base: float, scaling: str | None, factor: float, original_length: int | None) -> None:
    if length < 0:
        raise ValueError(f"length {length} is negative; give the number of positions")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim {dim} must be even and at least 2: channels are rotated in pairs")
    if not base > 0:
        raise ValueError(f"base {base} must be positive (10000 for LLaMA)")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling {scaling!r} is unknown (None, 'linear' or 'dynamic')")
    if factor < 1 or (scaling is None and factor != 1):
        raise ValueError(f"factor {factor} must be at least 1, and 1 without a scaling; choose scaling='linear'?")
    if (original_length is None) == (scaling == "dynamic"):
        raise ValueError(
            f"original_length {original_length} with scaling={scaling!r}: 'dynamic' needs it, the others have no use "
            "for it"
        )
    if original_length is not None and original_length < 1:
        raise ValueError(f"original_length {original_length} must be at least 1")
    if scaling == "dynamic" and dim == 2:
        raise ValueError("dim 2 has no dynamic scaling: its exponent dim / (dim - 2) is infinite")
