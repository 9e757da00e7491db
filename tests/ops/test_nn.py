"""The modules over the operators."""

import pytest
import torch

from dreamkernels.nn import RMSNorm
from dreamkernels.testing import assert_within_eager_error


def test_rms_norm_is_a_drop_in_for_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs, ours = llama.LlamaRMSNorm(48, eps=1e-5), RMSNorm(48, eps=1e-5)
    with torch.no_grad():
        theirs.weight.normal_(1, 0.1)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert ours.variance_epsilon == theirs.variance_epsilon
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        x = torch.randn(20, 48, dtype=dtype)
        exact = theirs.weight.double() * (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5))
        assert_within_eager_error(ours(x), theirs(x), exact)


def test_wide_weights_promote_as_in_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    ours, theirs = RMSNorm(16), llama.LlamaRMSNorm(16)
    assert ours(x).dtype == theirs(x).dtype == torch.float32
    torch.testing.assert_close(ours(x), theirs(x), rtol=2**-8, atol=0)
    y, residual = ours(x, residual=x)
    assert y.dtype == residual.dtype == torch.float32


def test_residual():
    norm = RMSNorm(8)
    x, residual = torch.randn(2, 3, 8)
    y, added = norm(x, residual)
    assert torch.equal(added, x + residual)
    assert torch.equal(y, norm(added))
    assert "8, eps=1e-06" in repr(norm)
