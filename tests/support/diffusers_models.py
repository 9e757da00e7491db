"""Small models with the structure of Stable Diffusion's, of random weights."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

WIDTH = 48
"""Of the conditions."""

_COMMON = {"sample_size": 16, "cross_attention_dim": WIDTH, "norm_num_groups": 8, "layers_per_block": 1}
_THREE = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd21": _COMMON | _THREE | {"attention_head_dim": [1, 2, 2], "use_linear_projection": True},
    "sd15": _COMMON | _THREE | {"attention_head_dim": 4},
    "xl": _COMMON
    | {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}

SD21: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": [5, 10, 20, 20],  # diffusers' name for the number of heads
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
"""The published configuration of Stable Diffusion 2.1-base's UNet."""


def make_unet(kind: str = "sd21", **changes: Any) -> UNet2DConditionModel:
    """A frozen UNet in evaluation mode. Its last convolution is scaled up: the result has a magnitude of about 1."""
    unet = UNet2DConditionModel(**(UNETS[kind] | changes)).eval().requires_grad_(False)
    with torch.no_grad():
        unet.conv_out.weight.mul_(4)
    return unet


def make_controlnet() -> ControlNetModel:
    model = ControlNetModel(
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        layers_per_block=1,
        block_out_channels=_THREE["block_out_channels"],
        down_block_types=_THREE["down_block_types"],
        attention_head_dim=[1, 2, 2],
        use_linear_projection=True,
        conditioning_embedding_out_channels=(8, 8),
    )
    for parameter in model.parameters():  # its last convolutions start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def make_vae() -> AutoencoderKL:
    return (
        AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=32,
        )
        .eval()
        .requires_grad_(False)
    )


def extra_conditions(kind: str, pictures: int) -> dict[str, Any]:
    """What SD XL takes beside the prompt's states."""
    if kind != "xl":
        return {}
    return {
        "added_cond_kwargs": {
            "text_embeds": torch.randn(pictures, 24),
            "time_ids": torch.randint(0, 512, (pictures, 6)).float(),
        }
    }


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also those in a dictionary, in another dtype."""
    if isinstance(value, dict):
        return {name: converted(inner, dtype) for name, inner in value.items()}
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def assert_close_to_eager_error(
    actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, factor: float = 2.0, what: str = "result"
) -> None:
    """The relative error in the Euclidean norm against float64 is at most `factor` times that of eager PyTorch."""
    norm = exact.double().norm()
    ours, theirs = ((found.double() - exact).norm() / norm for found in (actual, eager))
    assert actual.shape == exact.shape, f"{what}: {list(actual.shape)} instead of {list(exact.shape)}"
    assert ours <= factor * theirs, f"{what}: relative error {ours:.2e}, eager {theirs:.2e}"


def picture_and_gradient(
    run: Callable[[torch.Tensor], torch.Tensor], condition: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result for a condition, and the condition's gradient of the sum of squares."""
    condition = condition.clone().requires_grad_()
    picture = run(condition)
    (gradient,) = torch.autograd.grad(picture.float().square().sum(), condition)
    return picture.detach(), gradient
