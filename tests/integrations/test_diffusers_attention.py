"""A diffusers UNet over dreamkernels.attention, beside diffusers' own processor."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from dreamkernels.integrations.diffusers_attention import use_attention
from dreamkernels.testing import assert_within_eager_error


@pytest.fixture
def unet():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def outputs_and_gradients(unet, sample, condition):
    condition = condition.clone().requires_grad_()
    unet.zero_grad()
    out = unet(sample, 7, condition).sample
    out.square().sum().backward()
    return [out.detach(), condition.grad, unet.conv_in.weight.grad.clone()]


def test_pictures_and_gradients_are_as_exact_as_eager(unet):
    sample, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24)
    unet.set_attn_processor(AttnProcessor())
    eager = outputs_and_gradients(unet, sample, condition)
    unet.set_attn_processor(AttnProcessor2_0())
    use_attention(unet)
    ours = outputs_and_gradients(unet, sample, condition)
    unet.set_attn_processor(AttnProcessor())
    exact = outputs_and_gradients(unet.double(), sample.double(), condition.double())
    for k, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_eager_error(mine, theirs, truth, what=f"tensor {k}")


def test_processors_can_be_restored(unet):
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    restored = use_attention(unet)
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"DreamkernelsAttnProcessor"}
    unet.set_attn_processor(restored)
    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == before


def test_what_cannot_be_replaced_is_an_error(unet):
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"runs AttnProcessor2_0 \(AttnProcessor\)"):
        use_attention(unet)


def test_a_mask_is_refused(unet):
    use_attention(unet)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        unet(torch.randn(1, 4, 8, 8), 7, torch.randn(1, 6, 24), encoder_attention_mask=torch.ones(1, 6))
