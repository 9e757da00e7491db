"""The contact sheet shows what was drawn, and its exit status tells whether the pictures are the same."""

import pytest
import torch
from PIL import Image

from benchmarks import contact_sheet
from benchmarks.contact_sheet import FUSED, GAP, LIBRARIES, MARGIN, TITLE, sheet
from tests.tiny import tiny_model

ARGUMENTS = ["--captions", "A license", "Modify", "--seeds", "3", "--steps", "4", "--guidance-scale", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor = tiny_model(tmp_path_factory.mktemp("tiny"), vae=True, prediction_type="v_prediction")
    saved = tmp_path_factory.mktemp("model")
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    return saved


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_a_sheet_of_equal_pictures(folder, tmp_path, capsys, scheduler):
    out = tmp_path / "sheet.png"
    arguments = ["--model", str(folder), "--out", str(out), "--scheduler", scheduler, "--rounds", "1", *ARGUMENTS]
    assert contact_sheet.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"6 pictures of 16x16: 4 steps of {scheduler}, guidance 2.0")
    assert "ms per picture with the fused operators" in said
    with Image.open(out) as picture:
        assert picture.size == (3 * (3 * (32 + GAP) + MARGIN) + MARGIN, 2 * (32 + GAP) + TITLE + 2 * MARGIN)


def test_the_pictures_on_the_sheet_are_those_drawn():
    pictures = torch.rand(6, 3, 32, 32)
    shown = sheet({"one": pictures, "two": 1 - pictures}, columns=3)
    for number, panel in enumerate((pictures, 1 - pictures)):
        for index in range(6):
            left = MARGIN + number * (3 * (32 + GAP) + MARGIN) + index % 3 * (32 + GAP)
            top = MARGIN + TITLE + index // 3 * (32 + GAP)
            tile = torch.frombuffer(
                bytearray(shown.crop((left, top, left + 32, top + 32)).tobytes()), dtype=torch.uint8
            )
            expected = (panel[index] * 255).round().permute(1, 2, 0)
            assert torch.equal(tile.view(32, 32, 3).float(), expected)


@pytest.mark.parametrize(
    ("largest", "factor"), [(2e-6, 1e5), (0.5, 1), (0.04, 10), (0.9, 1), (0.0, 1), (float("nan"), 1)]
)
def test_the_difference_is_amplified_as_far_as_it_can_be_shown(largest, factor):
    assert contact_sheet.amplification(torch.tensor([0.0, -largest])) == factor


@pytest.mark.parametrize("wrong", [0.002, float("nan")])
def test_pictures_that_differ_are_an_error(folder, monkeypatch, capsys, wrong):
    draw = contact_sheet.draw

    def altered(model, *arguments):
        pictures = draw(model, *arguments)
        if model.diffusion_operators is not None:
            pictures[-1, 0, 3, 4] += wrong if pictures[-1, 0, 3, 4] < 0.5 else -wrong
        return pictures

    monkeypatch.setattr(contact_sheet, "draw", altered)
    assert contact_sheet.main(["--model", str(folder), "--rounds", "1", *ARGUMENTS]) == 1
    assert "differ by more than 0.001" in capsys.readouterr().err


def test_both_contenders_are_what_they_are_called(folder, monkeypatch):
    seen = {}
    compare = contact_sheet.compare

    def watched(assistants, *arguments):
        seen.update({name: assistant.engine.model.diffusion_operators for name, assistant in assistants.items()})
        return compare(assistants, *arguments)

    monkeypatch.setattr(contact_sheet, "compare", watched)
    contact_sheet.main(["--model", str(folder), "--rounds", "1", *ARGUMENTS])
    assert seen[FUSED] is not None
    assert seen[LIBRARIES] is None
