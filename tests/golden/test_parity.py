"""Logits, losses, gradients and greedy text of the original program, within the tolerances its numbers support."""

import pytest
import torch
from PIL import Image

from dreamllm.documents import EncodedDocument, pack_batch
from dreamllm.documents.batch import Pixels
from dreamllm.model import DiffusionDraws, load_original
from dreamllm.model.attention import PackedLayout
from tests.golden import reference

OUR_NAMES = {
    "model.dream_embedding.dream_queries": "dream_queries",
    "model.clip_vision_embedding.projector.projector.weight": "visual_projector.projector.weight",
    "model.clip_vision_embedding.projector.projector.bias": "visual_projector.projector.bias",
    "stable_diffusion_head.projector.projector.weight": "condition_projector.projector.weight",
}


def load(compat: str = "default"):
    return load_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION, compat)


@pytest.fixture(scope="module", params=["default", "original"])
def trained(request):
    """The golden batch through the padded interface, with gradients."""
    model, _ = load(request.param)
    model.train()
    model.set_trainable(reference.TRAINED)
    output = model(
        input_ids=reference.array("input_ids"),
        attention_mask=reference.array("attention_mask"),
        labels=reference.array("labels"),
        pixel_values=reference.array("images"),
        target_pixel_values=reference.array("images_dm"),
        target_latents=reference.array("latents"),
        draws=DiffusionDraws(reference.array("timesteps"), reference.array("noise")),
    )
    output.loss.backward()
    return model, output


def test_logits(trained):
    _, output = trained
    real = reference.array("attention_mask").bool()
    expected = reference.array("logits")[real]
    assert (output.logits[real] - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["loss", "lm_loss", "vm_loss"])
def test_losses(trained, name):
    _, output = trained
    torch.testing.assert_close(getattr(output, name), reference.array(name), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", reference.gradient_names())
def test_gradients(trained, name):
    model, _ = trained
    ours = model.get_parameter(OUR_NAMES.get(name, f"language_model.{name}")).grad
    expected = reference.array(f"grad:{name}")
    if name.endswith("dream_queries"):
        expected = expected[0]
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= 1e-3 * expected.norm()


def test_frozen_components_get_no_gradient(trained):
    model, _ = trained
    for group in ("vision_model", "unet", "vae"):
        assert all(p.grad is None for p in model.parameter_groups()[group])


def test_greedy_continuation_through_generate():
    model, processor = load()
    prompt, expected = reference.array("gen_prompt"), reference.array("gen_ids")
    vocabulary = processor.tokenizer.get_vocab()
    added = [[vocabulary[t]] for t in ("[PAD]", "<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>")]
    added += [[vocabulary["<dream_start>"]], [vocabulary["<dream_end>"]]]
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=reference.array("images")[:1],
        max_new_tokens=expected.shape[1] - prompt.shape[1],
        do_sample=False,
        bad_words_ids=added,
    )
    assert ids.tolist() == expected.tolist()


def test_packed_losses_equal_the_padded_ones():
    """The same batch without its padding, through `forward_packed`."""
    model, processor = load()
    ids, mask, labels = (reference.array(n) for n in ("input_ids", "attention_mask", "labels"))
    layout = processor.layout
    encoded = []
    for row_ids, row_mask, row_labels in zip(ids, mask, labels, strict=True):
        length = int(row_mask.sum())
        row = row_ids[:length].tolist()
        encoded.append(rebuild(row, row_labels[:length].tolist(), layout))
    batch = pack_batch(encoded, layout, NoTransforms())
    batch.pixel_values, batch.target_pixel_values = reference.array("images"), reference.array("images_dm")
    output = model.forward_packed(
        batch,
        draws=DiffusionDraws(reference.array("timesteps"), reference.array("noise")),
        target_latents=reference.array("latents"),
    )
    assert PackedLayout.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, batch.num_tokens).to_grid is not None
    for name in ("loss", "lm_loss", "vm_loss"):
        torch.testing.assert_close(getattr(output, name), reference.array(name), rtol=1e-4, atol=0)


class NoTransforms:
    """Stands in for the processor where the pixels are given."""

    def vision_pixels(self, images):
        return Pixels(torch.zeros(len(images)))

    def target_pixels(self, images):
        return Pixels(torch.zeros(len(images)))


def rebuild(row: list[int], labels: list[int], layout) -> EncodedDocument:
    """The encoded document of a row of the golden batch."""
    blank = Image.new("RGB", (64, 64))
    document = EncodedDocument(input_ids=row, labels=labels)
    document.image_starts = [i + 1 for i, token in enumerate(row) if token == layout.im_start]
    document.dream_starts = [i + 1 for i, token in enumerate(row) if token == layout.dream_start]
    document.images = [blank] * len(document.image_starts)
    document.targets = [blank] * len(document.dream_starts)
    return document
