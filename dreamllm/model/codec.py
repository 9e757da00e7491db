"""Pictures <-> latents: a Stable Diffusion VAE, or nothing at all for small pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor, nn

from dreamkernels.integrations.diffusers import optimize
from dreamllm.model.configuration import DreamLLMConfig
from dreamllm.model.pixels import check_pixels
from dreamllm.model.weights import SAFETENSORS, CheckpointError, load_into


class IdentityCodec(nn.Module):
    """Diffusion directly on pixels in [-1, 1]: the latent is the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


Codec: TypeAlias = AutoencoderKL | IdentityCodec


def build_codec(config: dict[str, Any]) -> Codec:
    """Builds the codec that `config` (diffusers' JSON, or that of `IdentityCodec`) describes."""
    if config.get("_class_name") == "IdentityCodec":
        return IdentityCodec(config["channels"])
    return AutoencoderKL.from_config(config)


def load_codec(folder: Path) -> Codec:
    """The codec of a model's folder alone, frozen and with the fused operators, as in the model: the same results.

    No other weight is read. Raises `CheckpointError`.
    """
    codec = build_codec(DreamLLMConfig.from_pretrained(folder).vae_config)
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            tensors |= {key.removeprefix("vae."): file.get_tensor(key) for key in file.keys() if key.startswith("vae.")}  # noqa: SIM118
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        codec.to(dtypes.pop())
    load_into(codec, tensors, str(folder))
    codec.eval().requires_grad_(False)
    if isinstance(codec, AutoencoderKL):
        optimize(codec, frozen=True)
    return codec


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{SAFETENSORS}.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({folder / file for key, file in weight_map.items() if key.startswith("vae.")})
    if not (folder / SAFETENSORS).is_file():
        raise CheckpointError(f"{folder} has no weights; looked for {SAFETENSORS} and its sharded form")
    return [folder / SAFETENSORS]


def vae_fingerprint(codec: Codec) -> dict[str, str]:
    """What identifies a VAE: its class and hashes of its configuration and of its weights, in the dtype they have.

    Raises `ValueError` for a codec that encodes nothing.
    """
    if isinstance(codec, IdentityCodec):
        raise ValueError("this model diffuses pixels: it has no VAE whose latents could be kept")
    config = {key: value for key, value in codec.config.items() if not key.startswith("_")}
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(codec.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        "class": type(codec).__name__,
        "configuration": hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16).hexdigest(),
        "weights": weights.hexdigest(),
    }


def encode_pictures(
    codec: Codec, pixels: Tensor, generator: torch.Generator | None = None, pictures_per_pass: int | None = None
) -> Tensor:
    """Pixels [N, C, H, W] in [-1, 1] -> scaled latents: a sample of the VAE's posterior, as the original trains.

    Raises `ValueError` for bytes in place of pixel values.
    """
    check_pixels(pixels)
    if isinstance(codec, IdentityCodec):
        return pixels
    return sample_moments(codec, encode_moments(codec, pixels, pictures_per_pass), generator)


def encode_moments(codec: AutoencoderKL, pixels: Tensor, pictures_per_pass: int | None = None) -> Tensor:
    """Pixels [N, C, H, W] in [-1, 1] -> mean and log-variance [N, 2c, h, w] of the VAE's posterior, not scaled.

    They have the dtype in which the VAE computes. Raises `ValueError` for bytes in place of pixel values.
    """
    check_pixels(pixels)
    parts = pixels.to(codec.dtype).split(pictures_per_pass or max(1, pixels.shape[0]))
    posteriors = [codec.encode(part).latent_dist for part in parts]
    return torch.cat([torch.cat([posterior.mean, posterior.logvar], dim=1) for posterior in posteriors])


def sample_moments(codec: AutoencoderKL, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean and log-variance [N, 2c, h, w] -> scaled latents [N, c, h, w], float32: mean + exp(logvar / 2) * noise."""
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar)  # in the dtype of the moments, as diffusers does
    noise = torch.randn(mean.shape, generator=generator, device=moments.device, dtype=torch.float32)
    return (mean.float() + std.float() * noise) * codec.config.scaling_factor


def decode_latents(codec: Codec, latents: Tensor) -> Tensor:
    """Scaled latents -> pictures [N, C, H, W] in [0, 1], float32."""
    pixels = latents if isinstance(codec, IdentityCodec) else _decode(codec, latents)
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
