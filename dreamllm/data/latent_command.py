"""`dreamllm data encode-latents` and `dreamllm data packing`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dreamllm.data.encode_latents import EncodeSettings, Precision, Storage
from dreamllm.data.encode_latents import encode_latents as encode
from dreamllm.data.latent_files import LatentCacheError, LatentIndex
from dreamllm.data.loader import Batches, LoaderSettings
from dreamllm.data.mixture import Mixture, Part
from dreamllm.data.open import open_data
from dreamllm.data.packing_report import measure_packing
from dreamllm.model import DreamLLMProcessor
from dreamllm.model.codec import load_codec
from dreamllm.model.folders import resolve_folder


def encode_latents(
    path: Path,
    model: str,
    out: Path,
    rank: int = 0,
    of: int = 1,
    storage: Storage = "exact",
    precision: Precision = "float32",
    mirrored: bool = False,
    pictures_per_pass: int = 8,
    pictures_per_shard: int = 1024,
    workers: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Encodes the pictures to create once, so that training need not. Rerun the same command to go on.

    Args:
        path: a folder or file of training data.
        model: folder (or hub id) of the model whose VAE encodes.
        out: folder of the cache; one that is there grows.
        rank: which part of the documents this process takes, from 0.
        of: how many processes share the work; each runs this command with another rank.
        storage: dtype of what is stored; "exact" is what the VAE computes in.
        precision: bfloat16 computes under autocast, as a training run of that precision does.
        mirrored: also encode each picture mirrored, for training with flip_targets.
        pictures_per_pass: pictures that go through the VAE together.
        pictures_per_shard: pictures per file, and how much work a kill can cost.
        workers: processes that read and decode pictures.
        device: where the VAE runs; auto is CUDA when there is one.
    """
    settings = EncodeSettings(storage, precision, mirrored, pictures_per_pass, pictures_per_shard, workers)
    reader = open_data(path, mode="creation")
    folder = resolve_folder(model)
    vae = load_codec(folder)
    if not isinstance(vae, AutoencoderKL):
        raise LatentCacheError(f"{model} diffuses pixels: it has no VAE whose latents could be kept")
    vae.to("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
    console = Console(stderr=True)
    columns = TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        report = encode(
            reader,
            vae,
            DreamLLMProcessor.from_pretrained(folder),
            out,
            rank,
            of,
            settings,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    index = LatentIndex.open(out)
    print(
        f"{out}: {report.encoded} pictures encoded, {report.known} were there; "
        f"{len(index)} pictures in {len(index.shards)} files"
    )
    if report.problems.counts:
        print(f"{report.problems.bad} documents have pictures that cannot be used\n{report.problems.summary()}")


def packing(
    path: Path,
    model: str,
    tokens_per_batch: int = 8192,
    look_ahead: int = 64,
    pictures_per_batch: int | None = None,
    packs: int = 100,
    seed: int = 0,
) -> None:
    """Shows how full packs of data are, beside padding to the longest document.

    Args:
        path: a folder or file of training data.
        model: folder (or hub id) of a model, for its tokenizer and layout.
        tokens_per_batch: the largest number of tokens of a pack.
        look_ahead: documents held back to choose from.
        pictures_per_batch: the largest number of pictures to create in a pack; by default any.
        packs: how many packs to plan.
        seed: of the order of the documents.
    """
    settings = LoaderSettings(
        tokens_per_batch=tokens_per_batch, look_ahead=look_ahead, pictures_per_batch=pictures_per_batch
    )
    processor = DreamLLMProcessor.from_pretrained(resolve_folder(model))
    mixture = Mixture([Part(open_data(path, seed=seed))], seed)
    print(measure_packing(Batches(mixture, processor, settings), packs))
