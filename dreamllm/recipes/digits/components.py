"""The components that recipe `digits` starts from: language model, vision encoder, picture decoder, made on the spot.

DreamLLM joins ready-made components. Here each is trained separately for about a minute: a LLaMA and its tokenizer on
text only, a CLIP vision model as a classifier of augmented training scans, and a UNet on 8-pixel pictures conditioned
on embeddings of the labels, which are thrown away afterwards. All are functions of the configuration, seed included.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dreamllm.data import derive_seed
from dreamllm.documents import PLAIN
from dreamllm.evaluation.digits_scans import Scans, load_scans
from dreamllm.model.processor import CLIPImageProcessorPil
from dreamllm.recipes.components import Schedule, optimise, seeded, write_language_model
from dreamllm.recipes.digits.data import corpus, vocabulary_texts
from dreamllm.training.files import make_folder, write_folder
from dreamllm.training.progress import quiet_transformers

SCAN_SIZE, NUMBERS = 8, 10
PARTS = ("llm", "clip", "diffusion")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The LLaMA and its tokenizer.

    `texts`: number of random texts to learn from. `vocab_size`: bound of the tokenizer, whose bytes and letters take
    about 300; the rest are the whole words of the texts. `context`: longest sequence, enough for ten pictures.
    """

    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    context: int = 512
    vocab_size: int = 640
    texts: int = 20_000
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=600, batch_size=32, learning_rate=2e-3))

    def llama(self) -> dict[str, Any]:
        """Fields of `LlamaConfig`."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.context,
        }


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training scans, each drawn evenly from minus to plus its bound.

    `rotation_degrees`; `scale`: relative, each axis for itself; `shift_pixels`: of the 8-pixel scan; `shear`: relative;
    `noise`: standard deviation of what is added to each pixel, of full ink.
    """

    rotation_degrees: float = 12.0
    scale: float = 0.12
    shift_pixels: float = 1.0
    shear: float = 0.15
    noise: float = 0.05


@dataclass(frozen=True)
class VisionEncoderConfig:
    """The CLIP vision model. Scans are enlarged to `image_size`, which gives (image_size / patch_size)^2 patches.

    `attention_dropout` and `label_smoothing` act in training only, as `augmentation` does.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    image_size: int = 32
    patch_size: int = 8
    attention_dropout: float = 0.1
    label_smoothing: float = 0.1
    augmentation: AugmentationConfig = AugmentationConfig()
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1500, batch_size=64, learning_rate=2e-3))

    def clip(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            attention_dropout=self.attention_dropout,
            projection_dim=self.hidden_size,
        )

    def image_processor(self) -> CLIPImageProcessorPil:
        return CLIPImageProcessorPil(
            size={"shortest_edge": self.image_size},
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )


@dataclass(frozen=True)
class DenoiserConfig:
    """The UNet on 8-pixel pictures, and its noise schedule (that of Stable Diffusion 2.1, with v-prediction).

    `num_heads`: heads of each attention (diffusers calls it `attention_head_dim`). `condition_tokens`: length of a
    label's embedding as a sequence; the dream queries take its place, in any number. `condition_dropout`: share of
    pictures whose label is hidden.
    """

    block_out_channels: tuple[int, int] = (32, 64)
    cross_attention_dim: int = 64
    num_heads: int = 2
    norm_num_groups: int = 8
    condition_tokens: int = 4
    condition_dropout: float = 0.1
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1000, batch_size=64, learning_rate=2e-3))

    def unet(self) -> Any:  # diffusers has no types
        return UNet2DConditionModel(
            sample_size=SCAN_SIZE,
            in_channels=1,
            out_channels=1,
            block_out_channels=self.block_out_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=self.cross_attention_dim,
            attention_head_dim=self.num_heads,
            norm_num_groups=self.norm_num_groups,
            use_linear_projection=True,
        )

    def scheduler(self) -> Any:
        return DDPMScheduler(
            num_train_timesteps=1000,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=True,
        )


@dataclass(frozen=True)
class ComponentConfig:
    """All three components. `scale` multiplies every number of steps (for tests)."""

    language: LanguageModelConfig = LanguageModelConfig()
    vision: VisionEncoderConfig = VisionEncoderConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    seed: int = 42
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, not {self.scale}")

    def scaled(self, schedule: Schedule) -> Schedule:
        return Schedule(max(1, round(schedule.steps * self.scale)), schedule.batch_size, schedule.learning_rate)


@dataclass(frozen=True)
class PartReport:
    """What making one component took. A component that was already there has taken nothing."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class ComponentReport:
    """The folder with `llm/`, `clip/` and `diffusion/`, and what each of them took."""

    folder: Path
    parts: dict[str, PartReport] = field(default_factory=dict)


def pretrain_components(
    folder: Path, config: ComponentConfig | None = None, console: Console | None = None
) -> ComponentReport:
    """Makes `llm/`, `clip/` and `diffusion/` in `folder`, ready for `assemble`; those that are there are kept.

    Progress is shown on `console` (default: standard output): a bar on a terminal, a few lines elsewhere. Raises
    `SaveError` when something cannot be written.
    """
    config = config or ComponentConfig()
    train, _ = load_scans()
    makers: dict[str, Callable[[Path], None]] = {
        "llm": lambda path: make_language_model(path, config, console),
        "clip": lambda path: make_vision_encoder(path, train, config, console),
        "diffusion": lambda path: make_denoiser(path, train, config, console),
    }
    make_folder(folder)
    report = ComponentReport(folder)
    for part in PARTS:
        start, cpu_start = time.perf_counter(), time.process_time()
        with quiet_transformers():
            makers[part](folder / part)
        report.parts[part] = PartReport(time.perf_counter() - start, time.process_time() - cpu_start)
    return report


def make_language_model(folder: Path, config: ComponentConfig, console: Console | None = None) -> None:
    """Writes a tokenizer and a LLaMA trained on the corpus, both in the layout of a LLaMA checkpoint."""
    language = config.language
    texts = [*vocabulary_texts(as_dialogue), *corpus(language.texts, derive_seed(config.seed, "corpus"), as_dialogue)]
    schedule = config.scaled(language.schedule)
    write_language_model(folder, texts, language.llama(), language.vocab_size, schedule, config.seed, console)


def make_vision_encoder(folder: Path, scans: Scans, config: ComponentConfig, console: Console | None = None) -> None:
    """Writes a CLIP vision model trained to classify augmented scans.

    The loss is taken twice: from the pooled output, and from the mean of the patch features of the last layer but one,
    which are all that DreamLLM reads.
    """
    if folder.is_dir():
        return
    vision = config.vision
    ink, labels = ink_of(scans), torch.from_numpy(scans.labels)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        changed = augment(ink[rows], vision.augmentation, generator)
        output = model(to_pixel_values(changed, vision.image_size), output_hidden_states=True)
        patches = output.hidden_states[-2][:, 1:].mean(1)
        whole = F.cross_entropy(pooled_head(output.pooler_output), labels[rows], label_smoothing=vision.label_smoothing)
        local = F.cross_entropy(patch_head(patches), labels[rows], label_smoothing=vision.label_smoothing)
        return whole + local

    with seeded(config.seed, "clip"):  # the weights, and then the attention dropout
        model = CLIPVisionModel(vision.clip())
        pooled_head, patch_head = (nn.Linear(vision.hidden_size, NUMBERS) for _ in range(2))
        trained = nn.ModuleList([model, pooled_head, patch_head])
        seed = derive_seed(config.seed, "clip")
        optimise("vision encoder", trained, len(scans), config.scaled(vision.schedule), loss, seed, console)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        vision.image_processor().save_pretrained(target)

    write_folder(folder, fill, "the vision encoder")


def make_denoiser(folder: Path, scans: Scans, config: ComponentConfig, console: Console | None = None) -> None:
    """Writes a UNet and its scheduler; `model_index.json` says that there is no VAE: the codec is the identity."""
    if folder.is_dir():
        return
    denoiser = config.denoiser
    pictures, labels = ink_of(scans)[:, None] * 2 - 1, torch.from_numpy(scans.labels)
    scheduler = denoiser.scheduler()
    total = scheduler.config.num_train_timesteps
    with seeded(config.seed, "unet"):
        unet = denoiser.unet()
        conditions = nn.Embedding(NUMBERS + 1, denoiser.condition_tokens * denoiser.cross_attention_dim)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        clean, count = pictures[rows], len(rows)
        hidden = torch.rand(count, generator=generator) < denoiser.condition_dropout
        condition = conditions(labels[rows].masked_fill(hidden, NUMBERS)).view(count, denoiser.condition_tokens, -1)
        # One timestep from each of `count` equal intervals: the same distribution, less noise in the loss.
        timesteps = ((torch.arange(count) + torch.rand(count, generator=generator)) * (total / count)).long()
        noise = torch.randn(clean.shape, generator=generator)
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, condition).sample
        return F.mse_loss(predicted, scheduler.get_velocity(clean, noise, timesteps))

    trained = nn.ModuleList([unet, conditions])
    schedule, seed = config.scaled(denoiser.schedule), derive_seed(config.seed, "unet")
    optimise("picture decoder", trained, len(scans), schedule, loss, seed, console)

    def fill(target: Path) -> None:
        unet.save_pretrained(target / "unet")
        scheduler.save_pretrained(target / "scheduler")
        (target / "model_index.json").write_text(json.dumps({"codec": "identity"}) + "\n")

    write_folder(folder, fill, "the picture decoder")


def as_dialogue(question: str, answer: str) -> str:
    """A turn in the template of the small models, as text."""
    return f"{PLAIN.opening(first=True)}{question}{PLAIN.closing()} {answer}"


def ink_of(scans: Scans) -> Tensor:
    """float32 [N, 8, 8] in [0, 1]."""
    return torch.from_numpy(scans.pictures.astype(np.float32) / 255)


def to_pixel_values(ink: Tensor, image_size: int) -> Tensor:
    """ink [N, 8, 8] in [0, 1] -> CLIP input [N, 3, size, size], as `VisionEncoderConfig.image_processor` makes it."""
    enlarged = ink[:, None]
    for size in ((ink.shape[1], image_size), (image_size, image_size)):  # Pillow too clips what overshoots each time
        enlarged = F.interpolate(enlarged, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return (enlarged * 2 - 1).expand(-1, 3, -1, -1)


def augment(ink: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Moves, turns, stretches and shears pictures [N, 8, 8] at random and adds noise; values stay in [0, 1]."""

    def spread(bound: float) -> Tensor:
        return (torch.rand(len(ink), generator=generator) * 2 - 1) * bound

    angle = spread(math.radians(config.rotation_degrees))
    width, height = 1 + spread(config.scale), 1 + spread(config.scale)
    shift = config.shift_pixels * 2 / SCAN_SIZE  # `affine_grid` measures from -1 to 1
    across, down, shear = spread(shift), spread(shift), spread(config.shear)
    rows = [
        torch.stack([angle.cos() * width, shear - angle.sin() * height, across], 1),
        torch.stack([angle.sin() * width, angle.cos() * height, down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(ink), 1, SCAN_SIZE, SCAN_SIZE], align_corners=False)
    moved = F.grid_sample(ink[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    return (moved + config.noise * torch.randn(ink.shape, generator=generator)).clamp(0, 1)
