"""Creation benchmarks from their files to the figure: a tiny model, but the networks in their full shapes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dreamllm.cli import main
from dreamllm.evaluation.answerer import ModelAnswerer
from dreamllm.evaluation.answering import SEED
from dreamllm.evaluation.benchmarks import find_benchmark
from dreamllm.evaluation.drawing import cropped_square
from dreamllm.evaluation.metrics import FeatureStatistics, inception_pixels
from dreamllm.inference import Assistant, ClipJudge, Engine
from tests.evaluation.folders import COUNT, CREATION_WRITERS
from tests.evaluation.networks import random_inception, write_clip, write_statistics
from tests.tiny import tiny_model

VARIANCE = 0.04
RECOMMENDED = {"steps": 3, "scheduler": "ddim", "eta": 0.5, "guidance_rescale": 0.7, "negative_prompt": "license"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The configuration recommends another way of drawing than the original protocol."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(folder / "parts", vae=True, drawing=RECOMMENDED)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model", Assistant(Engine(model, processor))


@pytest.mark.parametrize("name", CREATION_WRITERS)
def test_the_original_protocol_draws_in_its_own_way(name, model, monkeypatch):
    """Whatever the model's configuration recommends; the plain one draws as recommended."""
    seen = []
    answerer = ModelAnswerer(model[1], 1)
    monkeypatch.setattr(answerer._engine, "answers", lambda prompts, options, seeds: seen.append(options.drawing) or [])
    for drawing in find_benchmark(name).drawing.values():
        answerer.pictures([], drawing, [])
    original, plain = seen
    assert (original.steps, original.scheduler, original.guidance_scale) == (150, "ddpm", 2.0)
    assert (original.eta, original.guidance_rescale, original.negative_prompt) == (0.0, 0.0, "")
    assert original.candidates == (8 if name == "coco-fid" else 1)
    assert {key: getattr(plain, key) for key in RECOMMENDED} == RECOMMENDED
    assert plain.candidates == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CREATION_WRITERS)
def test_the_whole_way(name, model, tmp_path, capsys):
    """The figure is that of the closed form for the statistics on disk, and the pictures are the chosen candidates."""
    folder, assistant = model
    CREATION_WRITERS[name](tmp_path)
    benchmark = find_benchmark(name)
    network = random_inception()
    torch.save(network.state_dict(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    mean = write_statistics(tmp_path / benchmark.statistics, VARIANCE) if benchmark.statistics else None
    write_clip(tmp_path / "clip-vit-large-patch14")
    out = tmp_path / "out"
    main(["evaluate", name, *map(str, ("--model", folder, "--data", tmp_path, "--out", out, "--batch-size", 2))])
    results = json.loads((out / "results.json").read_text())
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == results["samples"] == COUNT
    drawn = [Image.open(out / "pictures" / f"{i:06d}.png").convert("RGB") for i in range(COUNT)]
    judge = ClipJudge(tmp_path / "clip-vit-large-patch14")
    for record, sample, picture in zip(records[:2], benchmark.load(tmp_path), drawn, strict=False):
        (candidates,) = ModelAnswerer(assistant, 3).pictures(
            [sample.prompt], benchmark.drawing["original"], [SEED + record["index"]]
        )
        check_choice(record, sample, candidates, judge, picture)
    pixels = inception_pixels([cropped_square(picture, 256) for picture in drawn], "bilinear")
    with torch.no_grad():
        features = network(pixels).double().numpy()
    kept = FeatureStatistics.load(out / "statistics.npz")
    np.testing.assert_allclose(kept.mean.numpy(), features.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept.covariance.numpy(), np.cov(features.T), rtol=1e-2, atol=1e-4)
    if mean is not None:
        spectrum = np.linalg.eigvalsh(kept.covariance.numpy()).clip(0)
        expected = ((kept.mean.numpy() - mean) ** 2).sum() + spectrum.sum() + 2048 * VARIANCE
        expected -= 2 * np.sqrt(VARIANCE * spectrum).sum()
        assert results["figures"][0]["value"] == pytest.approx(expected, rel=1e-4)
    assert results["figures"][0]["name"] == "FID"
    assert f"{results['figures'][0]['value']:.2f}" in capsys.readouterr().out


def check_choice(record, sample, candidates, judge, picture):
    """Drawn again in another batch: the candidate that CLIP agrees with most is the picture that was kept."""
    assert record["caption"] == sample.prompt.text()
    best = 0
    if len(candidates) > 1:
        agreement = judge.agreement(candidates, sample.captions).amax(1)
        assert record["agreement"] == pytest.approx(agreement.tolist(), abs=2e-3)
        best = record["candidate"]
        assert record["agreement"][best] == max(record["agreement"])
    difference = np.asarray(candidates[best], int) - np.asarray(picture, int)
    assert np.abs(difference).max() <= 1
