"""The latent cache: training draws from it what it would have computed, and it is never half there or another's."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreamllm.cli import main
from dreamllm.data import (
    Batches,
    DocumentList,
    EncodeSettings,
    LatentCache,
    LatentCacheError,
    LoaderSettings,
    LoaderState,
    Mixture,
    Part,
    encode_latents,
    load_steps,
    picture_key,
)
from dreamllm.data.latent_files import FileHeader, LatentIndex, shard_names
from dreamllm.documents import Document, End, Picture, Text, pair
from dreamllm.model.codec import encode_moments, load_codec, vae_fingerprint
from tests.data.pictures import png, write_pairs
from tests.tiny import random_picture, tiny_model

COUNT = 12
SMALL = EncodeSettings(pictures_per_pass=1, pictures_per_shard=3)


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), vae=True)


def documents(count: int = COUNT) -> list[Document]:
    """Pictures to create, from bytes, read as well or not; one occurs twice, one document has none."""
    made = [pair(png(i), "the license", "creation", f"pair {i}") for i in range(count - 2)]
    both = Picture(png(100), comprehension=True, creation=True)
    return [
        *made,
        Document((Text("a fox"), both, Picture(png(0), creation=True), End()), name="both"),
        pair(png(200), "only read", "comprehension", "read"),
    ]


READER = DocumentList(documents(), "pictures")


def cache_of(model, processor, folder, missing="error") -> LatentCache:
    return LatentCache(folder, vae_fingerprint(model.vae), processor.describe_target(), missing)


@pytest.fixture(scope="module")
def made(model_and_processor, tmp_path_factory):
    model, processor = model_and_processor
    folder = tmp_path_factory.mktemp("cache")
    report = encode_latents(READER, model.vae, processor, folder, settings=SMALL)
    assert (report.encoded, report.known, report.problems.bad) == (COUNT - 1, 1, 0)
    return folder


def batches(processor, latents=None, reader=READER, **settings) -> Batches:
    return Batches(Mixture([Part(reader)], 0), processor, LoaderSettings(COUNT, **settings), latents)


def contents(folder: Path) -> dict[bytes, torch.Tensor]:
    """Every picture's moments, whichever shard they lie in."""
    assert len(LatentIndex.open(folder).shards) == len(shard_names(folder))
    found: dict[bytes, torch.Tensor] = {}
    for name in shard_names(folder):
        shard = FileHeader.of(folder / name)
        found |= {bytes(key): shard.row("moments", row) for row, key in enumerate(shard.array("keys"))}
    return found


def assert_same_contents(folder: Path, other: Path) -> None:
    found, expected = contents(folder), contents(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def losses(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_packed(batch.to("cpu"), torch.Generator().manual_seed(7)).vm_loss


def test_training_draws_from_the_cache_what_it_would_have_computed(model_and_processor, made):
    model, processor = model_and_processor
    online, cached = batches(processor)[0], batches(processor, cache_of(model, processor, made))[0]
    assert cached.batch.target_pixel_values is None
    assert cached.batch.target_moments.shape == (COUNT, 8, 8, 8)
    model.pictures_per_pass = 1  # as the cache was made: convolutions round by the size of their batch
    try:
        assert torch.equal(losses(model, online.batch), losses(model, cached.batch))
    finally:
        model.pictures_per_pass = None
    assert torch.equal(online.batch.pixel_values, cached.batch.pixel_values)
    torch.testing.assert_close(losses(model, online.batch), losses(model, cached.batch), rtol=1e-5, atol=0)


def test_a_picture_to_create_that_is_cached_is_not_decoded(model_and_processor, made, monkeypatch):
    model, processor = model_and_processor
    read = []
    monkeypatch.setattr(
        "dreamllm.data.preparation.load_picture", lambda source: read.append(source) or random_picture(0)
    )
    batches(processor, cache_of(model, processor, made))[0]
    assert len(read) == 2  # the pictures that are read


def test_workers_read_the_cache_alike(model_and_processor, made):
    model, processor = model_and_processor
    loading = batches(processor, cache_of(model, processor, made))
    steps = [
        [
            loaded.batch.target_moments
            for (loaded,) in load_steps(loading, range(1), 1, LoaderState.initial(1), w, steps=3)
        ]
        for w in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize(("of", "workers"), [(2, 0), (3, 1)])
def test_any_number_of_processes_make_the_same_cache(model_and_processor, made, tmp_path, of, workers):
    model, processor = model_and_processor
    settings = replace(SMALL, workers=workers)
    reports = [encode_latents(READER, model.vae, processor, tmp_path, rank, of, settings) for rank in range(of)]
    assert sum(report.encoded for report in reports) == COUNT - 1
    assert_same_contents(tmp_path, made)


@pytest.fixture(scope="module")
def saved(model_and_processor, tmp_path_factory):
    model, processor = model_and_processor
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def forked(function, *args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def test_two_processes_at_once_killed_and_started_again_make_the_same_cache(model_and_processor, made, tmp_path):
    processes = [forked(_slowly, *model_and_processor, tmp_path, rank) for rank in range(2)]
    while not shard_names(tmp_path) and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    assert 0 < len(contents(tmp_path)) < COUNT - 1  # what there is can be read at once
    again = [forked(_slowly, *model_and_processor, tmp_path, rank) for rank in range(2)]
    for process in again:
        process.join()
    assert [process.exitcode for process in again] == [0, 0]
    assert_same_contents(tmp_path, made)


def _slowly(model, processor, folder, rank):
    """Slow enough to be killed in the middle."""
    torch.set_num_threads(1)
    encode = model.vae.encode
    model.vae.encode = lambda pixels: time.sleep(0.03) or encode(pixels)
    encode_latents(READER, model.vae, processor, folder, rank, 2, SMALL)


@pytest.mark.parametrize("moment", range(0, 14, 3))
def test_a_kill_at_any_write_leaves_whole_shards_only(model_and_processor, made, tmp_path, moment):
    """The process ends before its n-th flush or rename; the next one finishes the work."""
    model, processor = model_and_processor
    child = forked(_killed_at, model, processor, tmp_path, moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    before = {name: (tmp_path / name).read_bytes() for name in shard_names(tmp_path)}
    held = sum(len(FileHeader.of(tmp_path / name).array("keys")) for name in before)
    report = encode_latents(READER, model.vae, processor, tmp_path, settings=SMALL)
    assert report.encoded == COUNT - 1 - held
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert not list(tmp_path.glob("0*.partial"))
    assert_same_contents(tmp_path, made)


def _killed_at(model, processor, folder, moment):
    torch.set_num_threads(1)
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return call

    os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
    encode_latents(READER, model.vae, processor, folder, settings=SMALL)


def test_what_is_there_is_not_encoded_again(model_and_processor, made, tmp_path):
    model, processor = model_and_processor
    folder = shutil.copytree(made, tmp_path / "copy")
    again = encode_latents(READER, model.vae, processor, folder, settings=SMALL)
    assert again.encoded == again.known == 0  # its shards say that these documents are done
    more = DocumentList([*documents(), pair(png(300), "new", "creation")], "more")
    grown = encode_latents(more, model.vae, processor, folder, settings=SMALL)
    assert (grown.encoded, grown.known) == (1, COUNT)
    assert cache_of(model, processor, folder).find(png(300)) is not None


def test_a_changed_vae_or_transform_is_named(model_and_processor, made, tmp_path):
    model, processor = model_and_processor
    vae, transform = vae_fingerprint(model.vae), processor.describe_target()
    with pytest.raises(LatentCacheError, match=r"made for another model:\n  transform size: cache 16, model 32\n"):
        LatentCache(made, vae, {**transform, "size": 32})
    other, _ = tiny_model(tmp_path, seed=1, vae=True)
    with pytest.raises(LatentCacheError, match=r"model:\n  VAE weights: cache \w+, model \w+\nmake one"):
        LatentCache(made, vae_fingerprint(other.vae), transform)
    with pytest.raises(LatentCacheError, match="VAE weights"):
        encode_latents(READER, other.vae, processor, made, settings=SMALL)
    with pytest.raises(LatentCacheError, match="dtype: cache float32, asked for float16"):
        encode_latents(READER, model.vae, processor, made, settings=replace(SMALL, storage="float16"))
    with pytest.raises(LatentCacheError, match=r"holds no latent cache .*make one with: dreamllm data encode-latents"):
        LatentCache(tmp_path, vae, transform)
    with pytest.raises(ValueError, match="diffuses pixels"):
        vae_fingerprint(tiny_model(tmp_path / "pixels")[0].vae)


def test_a_saved_model_has_the_same_fingerprint_and_its_vae_loads_alone(model_and_processor, saved, tmp_path):
    model, _ = model_and_processor
    codec = load_codec(saved)
    assert vae_fingerprint(codec) == vae_fingerprint(model.vae)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encode_moments(codec, pixels), encode_moments(model.vae, pixels))
    assert vae_fingerprint(codec.to(torch.bfloat16)) != vae_fingerprint(model.vae)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert vae_fingerprint(load_codec(tmp_path)) == vae_fingerprint(model.vae)


def test_missing_pictures_are_an_error_or_encoded(model_and_processor, made):
    model, processor = model_and_processor
    more = DocumentList([*documents(COUNT), pair(png(300), "new", "creation", "the new one")], "more")
    strict = Batches(Mixture([Part(more)], 0), processor, LoaderSettings(COUNT + 1), cache_of(model, processor, made))
    for workers in (0, 1):
        with pytest.raises(LatentCacheError, match=r"^the latent cache .* lacks a picture of the new one; add"):
            list(load_steps(strict, range(1), 1, LoaderState.initial(1), workers, steps=1))
    lenient = cache_of(model, processor, made, "encode")
    mixed = Batches(Mixture([Part(more)], 0), processor, LoaderSettings(COUNT + 1), lenient)[0].batch
    online = Batches(Mixture([Part(more)], 0), processor, LoaderSettings(COUNT + 1))[0].batch
    assert mixed.target_pixel_values.shape[0] == mixed.unknown_moments.numel() == 1
    model.pictures_per_pass = 1
    try:
        assert torch.equal(losses(model, mixed), losses(model, online))
    finally:
        model.pictures_per_pass = None
    with pytest.raises(ValueError, match="missing must be"):
        cache_of(model, processor, made, "ignore")


@pytest.mark.parametrize("missing", ["error", "encode"])
def test_an_unreadable_picture_is_a_problem_of_its_sample_as_ever(model_and_processor, made, tmp_path, missing):
    model, processor = model_and_processor
    bad = [pair(png(1)[:50], "x", "creation", "cut"), pair(tmp_path / "none.png", "x", "creation", "gone")]
    reader = DocumentList([*documents(), *bad], "with bad ones")
    loading = Batches(
        Mixture([Part(reader)], 0), processor, LoaderSettings(len(reader)), cache_of(model, processor, made, missing)
    )
    assert {problem.reason for problem in loading[0].problems} == {"corrupt_image", "missing_image"}
    report = encode_latents(reader, model.vae, processor, tmp_path, settings=SMALL)
    assert report.problems.counts == {"corrupt_image": 1, "missing_image": 1}


def test_mirrored_pictures_are_cached_on_request(model_and_processor, made, tmp_path):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match=r"flip_targets mirrors pictures, but .* --mirrored"):
        batches(processor, cache_of(model, processor, made), flip_targets=True)
    encode_latents(READER, model.vae, processor, tmp_path, settings=replace(SMALL, mirrored=True))
    both = cache_of(model, processor, tmp_path)
    assert len(both) == 2 * (COUNT - 1)
    online, cached = (batches(processor, latents, flip_targets=True)[0].batch for latents in (None, both))
    assert not torch.equal(cached.target_moments, batches(processor, both)[0].batch.target_moments)
    torch.testing.assert_close(losses(model, online), losses(model, cached), rtol=1e-5, atol=0)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_smaller_storage_rounds_what_is_exact(model_and_processor, made, tmp_path, storage):
    model, processor = model_and_processor
    encode_latents(READER, model.vae, processor, tmp_path, settings=replace(SMALL, storage=storage))
    exact, rounded = contents(made), contents(tmp_path)
    dtype = getattr(torch, storage)
    assert all(torch.equal(rounded[key], moments.to(dtype)) for key, moments in exact.items())


def test_bfloat16_runs_are_matched_by_a_bfloat16_cache(model_and_processor, tmp_path):
    model, processor = model_and_processor
    encode_latents(READER, model.vae, processor, tmp_path, settings=replace(SMALL, precision="bfloat16"))
    cached = batches(processor, cache_of(model, processor, tmp_path))[0].batch
    assert cached.target_moments.dtype == torch.bfloat16
    model.pictures_per_pass = 1
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(losses(model, batches(processor)[0].batch), losses(model, cached))
    finally:
        model.pictures_per_pass = None


def test_damaged_files_are_named_and_a_lost_index_is_made_again(model_and_processor, made, tmp_path):
    model, processor = model_and_processor
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "index.safetensors").write_bytes(b"broken")
    assert len(cache_of(model, processor, folder)) == COUNT - 1
    shard = folder / shard_names(folder)[0]
    cache = cache_of(model, processor, folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    lost = next(d for d in documents() if cache.index.find(picture_key(d.pictures()[0].source))[0] == shard.name)
    with pytest.raises(LatentCacheError, match=f"{shard.name} is damaged .* remove it"):
        cache.find(lost.pictures()[0].source)
    shard.unlink()
    assert encode_latents(READER, model.vae, processor, folder, settings=SMALL).encoded == 3
    assert_same_contents(folder, made)
    os.truncate(folder / "latents.json", 3)
    with pytest.raises(LatentCacheError, match=r"latents\.json cannot be read"):
        cache_of(model, processor, folder)


def test_a_full_disk_leaves_what_is_there_and_says_so(model_and_processor, tmp_path, monkeypatch):
    model, processor = model_and_processor

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamllm.data.latent_files.save_tensors", full)
    with pytest.raises(LatentCacheError, match=r"No space left .* run the same command again"):
        encode_latents(READER, model.vae, processor, tmp_path, settings=SMALL)
    assert not shard_names(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_content_decides_a_key(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(1))
    same = {picture_key(source) for source in (png(1), tmp_path / "a.png", str(tmp_path / "b.png"))}
    assert len(same) == 1
    picture = random_picture(1)
    others = {picture_key(s) for s in (png(2), picture, picture.convert("L"), picture.resize((8, 32)))}
    assert len(others | same | {picture_key(png(1), mirrored=True)}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "int8"}, "storage must be 'exact'"),
        ({"precision": "float16"}, "precision must be"),
        ({"pictures_per_pass": 0}, "pictures_per_pass must be at least 1"),
        ({"pictures_per_shard": 0}, "pictures_per_shard must be at least 1"),
        ({"workers": -1}, "workers must not be negative"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EncodeSettings(**changes)


def test_ranks_outside_the_processes_are_refused(model_and_processor, tmp_path):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match="rank must lie in 0 to 1, not 2"):
        encode_latents(READER, model.vae, processor, tmp_path, 2, 2)


def test_the_identity_is_readable_json(made):
    values = json.loads((made / "latents.json").read_text())
    assert values["dtype"] == values["precision"] == "float32"
    assert values["transform"]["size"] == 16


def test_the_command_fills_a_cache_and_says_what_it_holds(saved, tmp_path, capsys):
    data = write_pairs(tmp_path / "data", 5)
    (data / "3.png").write_bytes(b"no picture")
    main(["data", "encode-latents", str(data), "--model", str(saved), "--out", str(tmp_path / "cache"), "--of", "2"])
    main(["data", "encode-latents", str(data), "--model", str(saved), "--out", str(tmp_path / "cache"), "--rank", "1",
          "--of", "2"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "3 pictures encoded, 0 were there; 3 pictures in 1 files" in printed
    assert "1 pictures encoded, 0 were there; 4 pictures in 2 files" in printed
    assert "1 documents have pictures that cannot be used" in printed
    assert "corrupt_image: 1" in printed


def test_the_command_refuses_a_model_without_a_vae(tmp_path, capsys):
    model, processor = tiny_model(tmp_path / "tiny")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "data", 1)
    with pytest.raises(SystemExit):
        main(["data", "encode-latents", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--out", "x"])
    assert "diffuses pixels" in capsys.readouterr().err
