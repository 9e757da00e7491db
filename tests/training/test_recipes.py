"""Recipe `small` from captioned pictures on disk to a model that loads."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from dreamllm.model import DreamLLM, DreamLLMProcessor
from dreamllm.recipes import RECIPES
from dreamllm.recipes.components import WordTable, train_tokenizer
from dreamllm.training import ConfigurationChangedError, RunSettings, read_metrics
from tests.data.pictures import write_tar
from tests.tiny import write_components
from tests.training.ranks import run_in
from tests.training.ranks import start as start_ranks

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", "triangle")
train_small = RECIPES["small"].run
SETTINGS = RunSettings(num_threads=1, log_every=1, device="cpu")


def shape(number: int) -> tuple[bytes, str]:
    """A PNG of 24 x 24 pixels with a coloured shape, and its caption."""
    colour, kind = COLOURS[number % 3], SHAPES[number // 3 % 3]
    left, top = 1 + number % 5, 1 + number % 7
    box = (left, top, left + 15, top + 15)
    image = Image.new("RGB", (24, 24), "white")
    draw = ImageDraw.Draw(image)
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(left, top + 15), (left + 15, top + 15), (left + 7, top)], fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), f"a {colour} {kind}"


def write_shapes(folder: Path, kind: str) -> Path:
    """Forty shapes as a folder of pictures and texts or as one webdataset tar."""
    folder.mkdir()
    members = {}
    for i in range(40):
        picture, caption = shape(i)
        members |= {f"{i:03d}.png": picture, f"{i:03d}.txt": caption.encode()}
    if kind == "tar":
        return write_tar(folder / "shapes.tar", members)
    for name, data in members.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(("kind", "scale"), [("folder", 0.03), ("tar", 0.02)])
def test_small_trains_on_captioned_pictures_from_disk(tmp_path, kind, scale):
    data = write_shapes(tmp_path / "data", kind)
    out = tmp_path / "out"
    train_small(out, data, scale=scale, settings=SETTINGS)
    lines = read_metrics(out)
    steps = {"stage1": round(300 * scale), "stage2": round(400 * scale), "stage3": round(200 * scale)}
    assert [line["stage"] for line in lines] == [name for name, count in steps.items() for _ in range(count)]
    stage2 = [line["lm_loss"] for line in lines if line["stage"] == "stage2"]
    assert sum(stage2[-3:]) < 0.9 * sum(stage2[:3])
    model, processor = DreamLLM.from_pretrained(out / "model"), DreamLLMProcessor.from_pretrained(out / "model")
    assert model.config.picture_size == 16
    assert model.config.drawing["guidance_scale"] == 2.0
    assert processor.decode_text(processor.encode_text("a green circle")) == "a green circle"
    before = (out / "model/model.safetensors").stat().st_mtime_ns
    train_small(out, data, scale=scale, settings=SETTINGS)
    assert (out / "model/model.safetensors").stat().st_mtime_ns == before


def test_small_starts_from_given_components(tmp_path):
    data = write_shapes(tmp_path / "data", "folder")
    components = tmp_path / "components"
    write_components(components, vae=True)
    train_small(tmp_path / "out", data, components=components, scale=0.005, settings=SETTINGS)
    model = DreamLLM.from_pretrained(tmp_path / "out/model")
    assert model.config.num_dream_queries == 64
    start = DreamLLM.from_pretrained(tmp_path / "out/start")
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), start.unet.parameters(), strict=True))
    assert not (tmp_path / "out/components").exists()


def test_components_folder_must_be_complete(tmp_path):
    data = write_shapes(tmp_path / "data", "folder")
    (tmp_path / "components/llm").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"lacks clip, diffusion; llm, clip and diffusion are needed"):
        train_small(tmp_path / "out", data, components=tmp_path / "components")


def test_a_run_folder_keeps_to_its_arguments(tmp_path):
    data = write_shapes(tmp_path / "data", "folder")
    train_small(tmp_path / "out", data, scale=0.001, settings=SETTINGS)
    with pytest.raises(ConfigurationChangedError, match=r"seed: 42 there, 7 now"):
        train_small(tmp_path / "out", data, seed=7, scale=0.001, settings=SETTINGS)
    stored = json.loads((tmp_path / "out/recipe.json").read_text())["configuration"]
    assert stored["recipe"] == "small"
    assert stored["pairs"] == 40


def test_data_without_a_usable_pair_is_an_error(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not a picture")
    (tmp_path / "x.txt").write_text("caption")
    with pytest.raises(ValueError, match=r"none of the 1 pairs of .* has a readable picture and a caption"):
        train_small(tmp_path / "out", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        train_small(tmp_path / "out", tmp_path / "nowhere")


def test_a_scale_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="scale must be positive"):
        train_small(tmp_path, tmp_path, scale=-1.0)


def test_the_tokenizer_knows_the_captions_words_and_spells_the_rest_in_bytes():
    captions = [shape(i)[1] for i in range(9)]
    proto = train_tokenizer(captions * 3, 1000)
    assert proto == train_tokenizer(captions * 3, 1000)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert pieces.encode("a green circle", out_type=str) == ["▁a", "▁green", "▁circle"]
    assert pieces.decode(pieces.encode("größer")) == "größer"
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)


def test_word_numbers_leave_room_for_padding_and_unknown_words():
    words = WordTable(["a red circle", "a blue square, a"], limit=3)
    rows = words.rows(["A red", "something", ""])
    assert len(words) == 5
    assert rows.shape == (3, 2)
    assert rows[0, 0] == 2  # the most frequent word
    assert rows[1].tolist() == [1, 0]
    assert rows[2].tolist() == [1, 0]
    assert math.prod(words.rows(["a"] * 4).shape) == 4


def test_small_is_prepared_once_and_trained_by_two_processes(tmp_path):
    data = write_shapes(tmp_path / "data", "folder")
    options = (data, 42, None, 0.005, None, SETTINGS)
    ended = run_in(2, train_small, tmp_path / "out", *options, logs=tmp_path / "logs")
    assert ended[0].text.count("making small components from 40 captioned pictures") == 1
    assert ended[1].text == ""
    assert json.loads((tmp_path / "out/recipe.json").read_text())["configuration"]["micro_batches"] == 2
    assert [line["stage"] for line in read_metrics(tmp_path / "out")] == ["stage1"] * 2 + ["stage2"] * 2 + ["stage3"]


@pytest.mark.slow
def test_two_processes_make_the_small_model_that_one_makes(tmp_path):
    data = write_shapes(tmp_path / "data", "folder")
    for world, name in ((1, "alone"), (2, "out")):
        options = (data, 42, None, 0.01, 2, SETTINGS)
        run_in(world, train_small, tmp_path / name, *options, logs=tmp_path / f"logs-{name}")
    start, expected = (load_file(tmp_path / f"{name}/start/model.safetensors") for name in ("out", "alone"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in start.items())
    lines, others = read_metrics(tmp_path / "out"), read_metrics(tmp_path / "alone")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in others], rel=1e-5)


def test_an_error_in_preparing_ends_all_processes_and_is_said_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.png").write_bytes(b"not a picture")
    (tmp_path / "data/x.txt").write_text("caption")
    ended = start_ranks(2, train_small, tmp_path / "out", tmp_path / "data", logs=tmp_path / "logs")()
    assert [end.code for end in ended] == [1, 1]
    assert "ValueError: none of the 1 pairs" in ended[0].text
    assert "Error" not in ended[1].text


@pytest.mark.slow
def test_digits_are_prepared_and_evaluated_once_by_two_processes(tmp_path):
    settings = RunSettings(num_threads=1, device="cpu", sharding="full")
    ended = run_in(2, RECIPES["digits"].run, tmp_path / "out", 42, 0.01, None, settings, logs=tmp_path / "logs")
    assert (tmp_path / "out/report.html").is_file()
    assert ended[0].text.count("minutes on") == 1
    assert "minutes on" not in ended[1].text
    assert "step" not in ended[1].text
