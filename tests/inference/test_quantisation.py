"""Weights in eight bits by torchao: how far from the exact ones, and who takes part."""

import sys

import pytest
import torch

from dreamllm.documents import prompt
from dreamllm.inference import Engine, GenerationOptions, load, quantise_weights
from tests.tiny import tiny_model

TEXT = GenerationOptions(max_new_tokens=6, pictures="forbid")


def decoder_linears(model):
    return {
        name: module
        for name, module in model.decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }


def test_without_torchao_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model, processor = tiny_model(tmp_path / "parts")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"int8 weights need torchao: pip install 'dreamkernels\[int8\]'"):
        load(tmp_path, int8_weights=True)


def test_outputs_stay_within_what_rounding_the_weights_can_change(tmp_path):
    """A weight w = s round(w / s), s = max |w| / 127 of its row, moves by at most s / 2: y by at most s / 2 sum |x|."""
    pytest.importorskip("torchao")
    model, _ = tiny_model(tmp_path)
    model.requires_grad_(False)
    weights = {name: linear.weight.detach().clone() for name, linear in decoder_linears(model).items()}
    assert quantise_weights(model) == len(weights) == 7 * len(model.decoder.layers)
    generator = torch.Generator().manual_seed(0)
    moved = 0.0
    for name, linear in decoder_linears(model).items():
        x = torch.randn(5, linear.in_features, generator=generator)
        exact = x.double() @ weights[name].double().T
        bound = x.abs().double().sum(1, keepdim=True) * (weights[name].double().abs().amax(1) / 127 / 2)
        rounding = 4 * torch.finfo(torch.float32).eps * (x.abs().double() @ weights[name].abs().double().T)
        error = (linear(x).double() - exact).abs()
        assert (error <= bound + rounding).all(), name
        moved = max(moved, error.max().item())
    assert moved > 1e-5  # so they are quantised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_writes_with_them_as_transformers_does(tmp_path, dtype):
    pytest.importorskip("torchao")
    model, processor = tiny_model(tmp_path)
    model = model.to(dtype).requires_grad_(False)
    engine = Engine(model, processor)
    plain = engine.conditions([prompt("The license")])
    quantise_weights(model)
    engine = Engine(model, processor)
    assert not torch.equal(engine.conditions([prompt("The license")]), plain)
    answer = engine.answer(prompt("The license"), TEXT)
    batch = processor.pad([processor.encode(prompt("The license"))])
    del batch["labels"]
    never = [*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start]
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False, suppress_tokens=never)
    if dtype == torch.float32:
        assert ids[0, batch["input_ids"].shape[1] :].tolist() == list(answer.token_ids)
    assert len(answer.token_ids) == 6 or answer.stopped == "end"


def test_what_is_trained_or_quantised_already_is_refused(tmp_path):
    pytest.importorskip("torchao")
    model, _ = tiny_model(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be trained; call model\.requires_grad_\(False\) first"):
        quantise_weights(model.requires_grad_(True))
    quantise_weights(model.requires_grad_(False))
    with pytest.raises(ValueError, match="quantise a model once"):
        quantise_weights(model)
