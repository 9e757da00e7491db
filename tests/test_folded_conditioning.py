"""The folded form of cross-attention against the unfolded one, in float64, with diffusers' weights."""

import pytest
import torch
import torch.nn.functional as F

from dreamkernels import fold_condition, folded_cross_conditioning, folding_pays
from dreamkernels.testing import assert_within_eager_error
from tests.support.conditioning import LAYERS, attentions, random_condition

DTYPES = (torch.float32, torch.bfloat16)


def unfolded(x, module, condition, layer, residual):
    """The definition of a layer, in eager PyTorch."""
    k, v = (part.repeat_interleave(condition.repeats, 0).transpose(1, 2) for part in condition.key_value(layer))
    q = F.linear(x, module.to_q.weight).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), *module.to_out[0].parameters()) + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", range(len(LAYERS)))
@pytest.mark.parametrize("keys", [1, 13, 64])
def test_the_folded_form_equals_the_unfolded_one_in_float64(dtype, layer, keys):
    module = attentions(dtype)[layer]
    condition = random_condition(2, keys, dtype).repeat(3)
    x, residual = (torch.randn(6, 37, module.query_dim).to(dtype) for _ in range(2))
    eager = unfolded(x, module, condition, layer, residual)
    folded = fold_condition(condition, layer, module.to_q.weight, *module.to_out[0].parameters())
    found = folded_cross_conditioning(x, folded, residual)
    module.double()
    exact = unfolded(x.double(), module, condition.to(dtype=torch.float64), layer, residual.double())
    assert_within_eager_error(found, eager, exact)
    without = folded_cross_conditioning(x, folded)
    torch.testing.assert_close(without + residual, found, rtol=2e-2, atol=2e-2)


def test_what_the_folded_form_cannot_do_is_named():
    condition, module = random_condition(), attentions()[0]
    weight_q, (weight_out, bias) = module.to_q.weight, module.to_out[0].parameters()
    folded = fold_condition(condition, 0, weight_q, weight_out, bias)
    with pytest.raises(ValueError, match=r"x \[3, 5, 32\] must be \[2, positions, 32\].* 2 x 1 pictures"):
        folded_cross_conditioning(torch.zeros(3, 5, 32), folded)
    with pytest.raises(ValueError, match=r"residual .* must have the shape of the result"):
        folded_cross_conditioning(torch.zeros(2, 5, 32), folded, torch.zeros(2, 5, 31))
    with pytest.raises(ValueError, match="has no gradient"):
        folded_cross_conditioning(torch.zeros(2, 5, 32, requires_grad=True), folded)
    with pytest.raises(ValueError, match=r"layer 1 has 3 heads of width 8: the query weight"):
        fold_condition(condition, 1, weight_q, weight_out)
    with pytest.raises(ValueError, match="output weight"):
        fold_condition(condition, 0, weight_q, weight_out[:, :5])


def test_folding_is_chosen_for_the_layers_where_it_was_measured_to_be_faster():
    assert folding_pays(320, 64, 64, positions=4096, steps=25)
    assert folding_pays(640, 64, 64, positions=1024, steps=25)
    assert not folding_pays(1280, 64, 64, positions=256, steps=25)
    assert not folding_pays(320, 77, 64, positions=4096, steps=25)  # larger matrices than the unfolded ones
    assert not folding_pays(640, 64, 64, positions=1024, steps=1)  # folding costs more than it saves
