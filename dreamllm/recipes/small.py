"""Recipe `small`: all stages on any set of captioned pictures, with components that are given or made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps
from rich.console import Console

from dreamllm.data import CaptionInstructions, Pairs, PairSource, Part, Permutation, derive_seed, open_pairs
from dreamllm.documents import PLAIN, VICUNA_V1_1, ChatTemplate, PictureError, load_picture
from dreamllm.model import AssembleOptions
from dreamllm.model.processor import CLIPImageProcessorPil
from dreamllm.planning import peak_flops
from dreamllm.recipes.components import (
    Schedule,
    write_denoiser,
    write_language_model,
    write_start,
    write_vision_encoder,
)
from dreamllm.training import (
    RunConfig,
    RunSettings,
    StageConfig,
    claim_folder,
    make_folder,
    processes,
)
from dreamllm.training import (
    run as run_stages,
)
from dreamllm.training.progress import quiet_transformers, say

VISION_SIZE, PATCH_SIZE, PICTURE_SIZE = 32, 8, 16
MAX_EXAMPLES = 4096
"""Pictures that the components see at most, chosen at random; they are held in memory."""

QUESTIONS = ("What is this?", "Describe the picture.", "What do you see?")
REQUESTS = ("Draw: {caption}", "Draw {caption}.", "Make a picture: {caption}")

LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
CLIP = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": VISION_SIZE,
    "patch_size": PATCH_SIZE,
}
UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
VOCAB_SIZE = 2048
DEFAULTS = RunSettings()


@dataclass(frozen=True)
class Plan:
    """The part of the recipe that depends on where the components come from.

    `rates`: peak learning rates of stages I, II and III. The paper's fit components that are large and well trained.
    """

    assemble: AssembleOptions
    template: ChatTemplate
    rates: tuple[float, float, float]


OWN_COMPONENTS = Plan(
    AssembleOptions(num_dream_queries=8, template="plain", config={"drawing": {"steps": 50, "guidance_scale": 2.0}}),
    PLAIN,
    (3e-3, 1e-3, 5e-4),
)
GIVEN_COMPONENTS = Plan(AssembleOptions(), VICUNA_V1_1, (2e-3, 2e-5, 4e-5))


def run(
    out: Path,
    data: Path,
    seed: int = 42,
    components: Path | None = None,
    scale: float = 1.0,
    micro_batches: int | None = None,
    settings: RunSettings = DEFAULTS,
) -> Path:
    """Trains all stages on your own pictures with captions, with components that are given or made on the spot.

    Without `components` small ones are trained on the same pairs first: tokenizer and LLaMA on the captions, CLIP
    vision model, and a UNet on 16-pixel pictures. Then stage I (both halves), stage II (pairs in both directions) and
    stage III (instructions made from the captions). What is complete in `out` is kept, so the same call resumes.
    Started by torchrun, the main process prepares and all share the training; `out` must be a folder that all see.
    Returns the model's folder, `out/model`.

    Args:
        out: folder of the run; the trained model will be in its subfolder model.
        data: image-text pairs, a folder or tars; see `open_pairs`.
        seed: everything random follows from it.
        components: folder with subfolders llm, clip and diffusion to start from.
        scale: multiplies all numbers of steps.
        micro_batches: passes that share a step, over all processes; by default one for each process.
        settings: how the run proceeds on this machine.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    plan = OWN_COMPONENTS if components is None else GIVEN_COMPONENTS
    with processes(settings.device, grouped=settings.sharding != "none") as these:
        lanes = micro_batches or these.world
        these.lanes(lanes)

        def prepare() -> Path:
            console, source = Console(), open_pairs(data)
            make_folder(out)
            arguments = {
                "recipe": "small",
                "data": str(Path(data).absolute()),
                "pairs": len(source),
                "components": None if components is None else str(Path(components).absolute()),
                "seed": seed,
                "scale": scale,
                "micro_batches": lanes,
            }
            claim_folder(out / "recipe.json", arguments, say=lambda text: say(console, text))
            with quiet_transformers():
                parts = components or make_components(out / "components", source, seed, scale, console)
                return write_start(out / "start", Path(parts), plan.assemble, seed)

        start = these.prepare(prepare)
        config = RunConfig(start, stages(open_pairs(data), plan, seed, scale, lanes), out, seed, settings)
        return run_stages(config, peak=peak_flops)


def stages(source: PairSource, plan: Plan, seed: int, scale: float, micro_batches: int) -> tuple[StageConfig, ...]:
    """The three stages over `source`."""
    pairs = (Part(Pairs(source, "both", derive_seed(seed, "pairs"))),)
    orders = (Part(CaptionInstructions(source, plan.template, QUESTIONS, REQUESTS, derive_seed(seed, "instructions"))),)
    common: dict[str, Any] = {"documents_per_step": 16, "warmup_ratio": 0.03, "condition_dropout": 0.1}
    common["micro_batches"] = micro_batches
    first, second, third = plan.rates
    return (
        StageConfig("stage1", "stage1", pairs, steps=_scaled(300, scale), learning_rate=first, **common),
        StageConfig("stage2", "stage2", pairs, steps=_scaled(400, scale), learning_rate=second, **common),
        StageConfig("stage3", "stage3", orders, steps=_scaled(200, scale), learning_rate=third, **common),
    )


def make_components(folder: Path, source: PairSource, seed: int, scale: float, console: Console) -> Path:
    """Trains `llm/`, `clip/` and `diffusion/` on the pairs of `source` and returns `folder`."""
    parts = (folder / "llm", folder / "clip", folder / "diffusion")
    if all(part.is_dir() for part in parts):
        return folder
    images, captions = load_examples(source, seed)
    say(console, f"making small components from {len(captions)} captioned pictures")
    llm, clip, diffusion = parts
    texts = [*captions, *(_as_instruction(caption, i) for i, caption in enumerate(captions))]
    write_language_model(llm, texts, LLAMA, VOCAB_SIZE, Schedule(_scaled(200, scale), 16, 2e-3), seed, console)
    size = {"shortest_edge": VISION_SIZE}, {"height": VISION_SIZE, "width": VISION_SIZE}
    image_processor = CLIPImageProcessorPil(size=size[0], crop_size=size[1])
    pixels = image_processor(images, return_tensors="pt")["pixel_values"].float()
    write_vision_encoder(
        clip, pixels, captions, CLIP, image_processor, Schedule(_scaled(300, scale), 32, 1e-3), seed, console
    )
    targets = torch.stack([_target(image) for image in images])
    scheduler = DDPMScheduler(**SCHEDULER)
    write_denoiser(
        diffusion, targets, captions, UNET, scheduler, Schedule(_scaled(600, scale), 32, 2e-3), seed, console=console
    )
    return folder


def load_examples(source: PairSource, seed: int) -> tuple[list[Image.Image], list[str]]:
    """At most `MAX_EXAMPLES` readable pictures, cropped to a square, with their captions, in a random order.

    Raises `ValueError` when there are none.
    """
    order = Permutation(max(1, len(source)), derive_seed(seed, "examples"))
    images: list[Image.Image] = []
    captions: list[str] = []
    for index in map(order.__getitem__, range(len(source))):
        example = source.usable_pair(index)
        image = None if example is None else _readable(example.image)
        if example is not None and image is not None:
            images.append(ImageOps.fit(image, (VISION_SIZE, VISION_SIZE), Image.Resampling.BICUBIC))
            captions.append(example.caption)
        if len(captions) == MAX_EXAMPLES:
            break
    if not captions:
        raise ValueError(f"none of the {len(source)} pairs of {source.name} has a readable picture and a caption")
    return images, captions


def _readable(image: Any) -> Image.Image | None:
    try:
        return load_picture(image)
    except PictureError:
        return None


def _target(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def _as_instruction(caption: str, index: int) -> str:
    """A dialogue as text, so that the language model has seen its wording."""
    opening, closing = PLAIN.opening(first=True), PLAIN.closing()
    if index % 2:
        return f"{opening}{QUESTIONS[index // 2 % len(QUESTIONS)]}{closing} {caption}"
    return f"{opening}{REQUESTS[index // 2 % len(REQUESTS)].replace('{caption}', caption)}{closing}"


def _scaled(steps: int, scale: float) -> int:
    return max(1, round(steps * scale))
