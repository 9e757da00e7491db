"""Pixel values are those of transformers' image processor and of plain arithmetic, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dreamkernels import libraries
from dreamllm.documents.batch import Pixels
from dreamllm.model.pixels import VisionPixels, check_pixels, target_pixels
from dreamllm.model.processor import CLIPImageProcessorPil

SIZES = [(224, 224), (225, 224), (640, 480), (333, 1001), (57, 80), (1, 1), (3, 400), (500, 223), (448, 448)]


def pictures(mode: str = "RGB") -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode) for w, h in SIZES]


OTHERWISE = {
    "as CLIP": {},
    "small": {"size": {"shortest_edge": 33}, "crop_size": {"height": 32, "width": 31}},
    "bilinear": {"resample": 2},
    "other statistics": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "crop larger than the picture": {"crop_size": {"height": 300, "width": 300}},
    "square": {"size": {"height": 20, "width": 20}, "crop_size": {"height": 20, "width": 20}},
}


@pytest.mark.parametrize("settings", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_vision_is_the_image_processors_own(settings):
    processor = CLIPImageProcessorPil(**settings)
    expected = processor(pictures(), return_tensors="pt")["pixel_values"].float()
    found = VisionPixels(processor)(pictures()).expanded()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_vision_follows_a_processor_that_is_changed():
    processor = CLIPImageProcessorPil()
    vision = VisionPixels(processor)
    first = vision(pictures()[:2]).expanded()
    processor.image_mean = [0.0, 0.0, 0.0]
    again = vision(pictures()[:2]).expanded()
    assert torch.equal(again, processor(pictures()[:2], return_tensors="pt")["pixel_values"])
    assert not torch.equal(again, first)


def test_pictures_of_another_mode_are_left_to_the_processor():
    processor = CLIPImageProcessorPil()
    expected = processor(pictures("L"), return_tensors="pt")["pixel_values"]
    assert torch.equal(VisionPixels(processor)(pictures("L")).expanded(), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 65])
def test_targets_are_resized_cropped_and_scaled(size, channels):
    found = target_pixels(pictures(), size, channels).expanded()
    assert found.shape == (len(SIZES), channels, size, size)
    for image, values in zip(pictures(), found, strict=True):
        short = min(image.size)
        width, height = (max(size, round(side * (size / short))) for side in image.size)
        resized = image if short == size else image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        array = np.asarray(resized.convert("L") if channels == 1 else resized, dtype=np.float32)
        array = array[top : top + size, left : left + size] / 127.5 - 1.0
        expected = array[None] if channels == 1 else array.transpose(2, 0, 1)
        assert torch.equal(values, torch.from_numpy(np.ascontiguousarray(expected)))


@pytest.mark.gpu
def test_a_gpu_looks_the_same_values_up():
    for pixels in (target_pixels(pictures(), 65, 3), VisionPixels(CLIPImageProcessorPil())(pictures())):
        there = Pixels(pixels.values.cuda(), pixels.table.cuda()).expanded()
        assert torch.equal(there.cpu(), pixels.expanded())


def test_bytes_are_a_quarter_of_the_pixel_values_and_no_model_takes_them_for_those():
    bytes_alone = target_pixels(pictures()[:2], 8, 3)
    assert bytes_alone.values.dtype == torch.uint8
    assert bytes_alone.values.nbytes * 4 == bytes_alone.expanded().nbytes
    check_pixels(bytes_alone.expanded())
    with pytest.raises(ValueError, match=r"not torch\.uint8: batch\.to\(device\) makes them"):
        check_pixels(bytes_alone.values)


@pytest.mark.parametrize("settings", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_without_the_compiled_module_pillow_resizes_to_the_same_bits(settings, monkeypatch):
    processor = CLIPImageProcessorPil(**settings)
    compiled = [VisionPixels(processor)(pictures()).expanded(), target_pixels(pictures(), 65, 3).expanded()]
    monkeypatch.setattr(libraries, "EXTENSION", None)
    pillows = [VisionPixels(processor)(pictures()).expanded(), target_pixels(pictures(), 65, 3).expanded()]
    assert all(torch.equal(a, b) for a, b in zip(compiled, pillows, strict=True))
