"""A run that draws its pictures' latents from a cache is the run that encodes them."""

from dataclasses import replace

import pytest

from dreamllm.data import LatentCacheError, Pairs, encode_latents, open_pairs
from dreamllm.data.encode_latents import EncodeSettings
from dreamllm.model import DreamLLMProcessor
from dreamllm.model.codec import load_codec
from dreamllm.training import read_metrics
from tests.data.pictures import write_pairs
from tests.tiny import tiny_model
from tests.training.runs import config, quiet_run


def write_model(folder, seed=0):
    model, processor = tiny_model(folder / "components", seed, vae=True)
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    return folder / "start"


def write_cache(start, data, out):
    reader = Pairs(open_pairs(data), "creation", seed=3)
    transform = DreamLLMProcessor.from_pretrained(start)
    encode_latents(reader, load_codec(start), transform, out, settings=EncodeSettings(pictures_per_pass=1))
    return out


def assert_same_losses(out, reference):
    """To rounding: how many pictures go through the VAE together decides the order of its sums."""
    for mine, expected in zip(read_metrics(out), read_metrics(reference), strict=True):
        for name in ("lm_loss", "vm_loss", "grad_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model with a VAE, twenty captioned pictures the cache of their latents, and one of other pictures."""
    folder = tmp_path_factory.mktemp("latents")
    start = write_model(folder)
    write_pairs(folder / "data", 20)
    write_cache(start, folder / "data", folder / "cache")
    write_pairs(folder / "other", 3)
    write_cache(start, folder / "other", folder / "small_cache")
    return folder


def test_same_losses_as_encoding_in_every_step(root, tmp_path):
    online = config(root, tmp_path / "online", pictures_per_pass=1)
    quiet_run(online)
    cached = replace(online, out=tmp_path / "cached", settings=replace(online.settings, latents=root / "cache"))
    quiet_run(cached)
    assert_same_losses(tmp_path / "cached", tmp_path / "online")


def test_a_cache_that_lacks_pictures(root, tmp_path):
    settings = {"pictures_per_pass": 1, "latents": root / "small_cache"}
    with pytest.raises(LatentCacheError, match="lacks a picture of"):
        quiet_run(config(root, tmp_path / "error", **settings))
    quiet_run(config(root, tmp_path / "encode", missing_latents="encode", **settings))
    quiet_run(config(root, tmp_path / "online", pictures_per_pass=1))
    assert_same_losses(tmp_path / "encode", tmp_path / "online")


def test_a_cache_of_another_vae_is_refused(root, tmp_path):
    other = write_model(tmp_path, seed=5)
    cache = write_cache(other, root / "data", tmp_path / "cache")
    with pytest.raises(LatentCacheError, match="was made for another model"):
        quiet_run(config(root, tmp_path / "out", latents=cache))
    with pytest.raises(LatentCacheError, match="nowhere"):
        quiet_run(config(root, tmp_path / "out2", latents=tmp_path / "nowhere"))
