"""A tiny random DreamLLM and its component folders, for tests of any part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dreamllm.model import AssembleOptions, DreamLLM, DreamLLMProcessor, assemble
from tests.golden import reference

VOCAB_SIZE = 800
HIDDEN = 32
NUM_QUERIES = 4

_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write_components(folder: Path, seed: int = 0, vae: bool = False, **scheduler: object) -> tuple[Path, Path, Path]:
    """Writes random `llm/`, `clip/` and `diffusion/` folders and returns their paths."""
    llm, clip, diffusion = folder / "llm", folder / "clip", folder / "diffusion"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        )  # fmt: skip
        LlamaForCausalLM(text).save_pretrained(llm)
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16,
            patch_size=8, initializer_factor=3.0,
        )  # fmt: skip
        CLIPVisionModel(vision).save_pretrained(clip)
        channels = 4 if vae else 1
        UNet2DConditionModel(in_channels=channels, out_channels=channels, **_UNET).save_pretrained(diffusion / "unet")
        if vae:
            AutoencoderKL(
                block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            ).save_pretrained(diffusion / "vae")  # fmt: skip
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(reference.CHECKPOINT / name, llm / name)
    _forget_added_tokens(llm / "tokenizer_config.json")
    size = {"shortest_edge": 16}, {"height": 16, "width": 16}
    preprocessor = json.loads((reference.CLIP / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"size": size[0], "crop_size": size[1]}))
    (diffusion / "scheduler").mkdir()
    (diffusion / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SCHEDULER | scheduler))
    if not vae:
        (diffusion / "model_index.json").write_text(json.dumps({"codec": "identity"}))
    return llm, clip, diffusion


def _forget_added_tokens(path: Path) -> None:
    """Makes the tokenizer a plain LLaMA one: DreamLLM's tokens are yet to be added."""
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {k: v for k, v in config["added_tokens_decoder"].items() if int(k) < 3}
    config["additional_special_tokens"] = []
    del config["pad_token"]
    path.write_text(json.dumps(config))
    (path.parent / "special_tokens_map.json").unlink()


def tiny_model(
    folder: Path, seed: int = 0, vae: bool = False, prediction_type: str = "epsilon", **config: object
) -> tuple[DreamLLM, DreamLLMProcessor]:
    """A random DreamLLM: hidden 32, 2 layers, 4 queries, 4 tokens per picture; 8-pixel grey or 16-pixel pictures."""
    components = write_components(folder, seed, vae, prediction_type=prediction_type)
    options = AssembleOptions(num_dream_queries=NUM_QUERIES, seed=seed, template="plain", config=config)
    return assemble(*components, options)


def random_picture(seed: int, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy())
