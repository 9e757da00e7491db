"""The original program's checkpoint layout: read, and written back exactly (spec section E)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from dreamllm.model.assemble import (
    DIFFUSION_MIRRORS,
    POSITION_BUFFER,
    ROTARY_BUFFER,
    read_diffusion_configs,
    read_vision_config,
    vision_names,
)
from dreamllm.model.configuration import Compat, DreamLLMConfig
from dreamllm.model.folders import resolve_folder
from dreamllm.model.modeling import DreamLLM
from dreamllm.model.processor import (
    SENTENCEPIECE_FILE,
    CLIPImageProcessorPil,
    DreamLLMProcessor,
    ProcessorSettings,
    load_tokenizer,
    read_sentencepiece,
    special_token_ids,
)
from dreamllm.model.weights import PICKLE, SAFETENSORS, CheckpointError, load_into, read_file, read_folder

CLIP_FILE, DREAM_FILE, HEAD_FILE = "clip_vision_embedding.bin", "dream_embedding.bin", "stable_diffusion_head.bin"
LEGACY_FILES = {
    CLIP_FILE: "clip_vision_model_projector.pt",
    DREAM_FILE: "dream_queries.pt",
    HEAD_FILE: "unet_projector.pt",
}
"""Older names of the plug-in files; those of the two projectors hold only the projector."""

PLUGIN_PREFIXES = {
    CLIP_FILE: "model.clip_vision_embedding.",
    DREAM_FILE: "model.dream_embedding.",
    HEAD_FILE: "stable_diffusion_head.",
}
"""Where a fully gathered `pytorch_model.bin` holds the plug-ins' tensors."""

CLIP_TENSORS = "clip_vision_model.vision_model."
PROJECTOR = "projector."
RECORD_FOLDER = "original"
"""Inside our folder: the original's files that we do not otherwise keep."""

RECORD_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling",
    "attention_bias", "pretraining_tp", "tie_word_embeddings",
)  # fmt: skip


def load_original(
    checkpoint: str | Path,
    clip: str | Path,
    diffusion: str | Path,
    compat: Compat = "default",
    diffusion_mirrors: Sequence[str] = DIFFUSION_MIRRORS,
) -> tuple[DreamLLM, DreamLLMProcessor]:
    """Loads a checkpoint that the original program wrote.

    `clip` and `diffusion` are the folders (or hub ids) of the components' configurations; their weights come from the
    checkpoint. Token ids are read from the tokenizer, never from the checkpoint's `config.json`, whose ids are wrong in
    the released models. Raises `CheckpointError` naming whatever is missing or mis-shaped.
    """
    folder = resolve_folder(checkpoint)
    clip_dir, diffusion_dir = resolve_folder(clip), resolve_folder(diffusion, diffusion_mirrors)
    original = _read_config(folder)
    tokenizer = load_tokenizer(folder)
    config = _to_config(original, clip_dir, diffusion_dir, special_token_ids(tokenizer), compat)
    language, plugins = _read_tensors(folder)
    model = DreamLLM(config)
    _load(model, language, plugins, folder)
    dtype = getattr(torch, str(original.get("torch_dtype") or "float32").removeprefix("torch."))
    settings = ProcessorSettings.from_config(config)
    image_processor = CLIPImageProcessorPil.from_pretrained(clip_dir)
    processor = DreamLLMProcessor(image_processor, tokenizer, settings, read_sentencepiece(folder))
    return model.to(dtype).eval(), processor


def save_original(
    model: DreamLLM, processor: DreamLLMProcessor, folder: str | Path, record: str | Path | None = None
) -> None:
    """Writes `model` in the original's layout into `folder` (new or empty).

    `record` is a folder with the configuration and tokenizer files of the original checkpoint that the model came
    from; they are written back as they were, with the fields that the model decides updated. Raises `CheckpointError`
    for a model that the original could not hold: another decoder than LLaMA, no VAE.
    """
    folder = Path(folder)
    if model.config.text_config.model_type != "llama":
        raise CheckpointError(f"the original holds LLaMA decoders only, not {model.config.text_config.model_type!r}")
    if model.config.identity_codec:
        raise CheckpointError("the original always has a VAE; this model diffuses pixels and cannot be written so")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_language_tensors(model), folder / SAFETENSORS, metadata={"format": "pt"})
    for name, tensors in _plugin_tensors(model).items():
        torch.save(tensors, folder / name)
    if record is None:
        processor.tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        known = _new_record(model.config, processor)
    else:
        known = json.loads((Path(record) / "config.json").read_text())
        copy_record(Path(record), folder)
    config = _update_record(model, known)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if processor.sentencepiece_model is not None:
        (folder / SENTENCEPIECE_FILE).write_bytes(processor.sentencepiece_model)


def copy_record(source: Path, folder: Path) -> None:
    """Copies an original checkpoint's configuration and tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RECORD_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def convert_from_original(
    checkpoint: str | Path,
    clip: str | Path,
    diffusion: str | Path,
    out: str | Path,
    compat: Compat = "default",
    diffusion_mirrors: Sequence[str] = DIFFUSION_MIRRORS,
) -> None:
    """Reads an original checkpoint and writes our folder `out`; `convert_to_original` restores it exactly."""
    model, processor = load_original(checkpoint, clip, diffusion, compat, diffusion_mirrors)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    copy_record(resolve_folder(checkpoint), Path(out) / RECORD_FOLDER)


def convert_to_original(model_dir: str | Path, out: str | Path) -> None:
    """Writes the model of our folder `model_dir` in the original's layout."""
    record = Path(model_dir) / RECORD_FOLDER
    model = DreamLLM.from_pretrained(model_dir)
    save_original(model, DreamLLMProcessor.from_pretrained(model_dir), out, record if record.is_dir() else None)


# -- reading ------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    config = json.loads(path.read_text())
    if config.get("model_type") != "dreamllm" or "plugins_init_kwargs" not in config:
        raise CheckpointError(f"{path} is not a configuration of the original DreamLLM (no plugins_init_kwargs)")
    return config


def _to_config(
    original: dict[str, Any], clip: Path, diffusion: Path, token_ids: dict[str, int], compat: Compat
) -> DreamLLMConfig:
    vision = original["plugins_init_kwargs"]["clip_vision_embedding"]
    head = original["plugins_init_kwargs"]["stable_diffusion_head"]
    dream = original["plugins_init_kwargs"]["dream_embedding"]
    text = {name: original[name] for name in _TEXT_FIELDS if original.get(name) is not None}
    ids = {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    return DreamLLMConfig(
        text_config=LlamaConfig(**text, **ids),
        vision_config=read_vision_config(clip),
        **read_diffusion_configs(diffusion),
        token_ids=token_ids,
        num_dream_queries=dream["num_dream_queries"],
        visual_projector=vision.get("projector_type", "linear"),
        visual_projector_depth=vision.get("projector_depth", 1),
        visual_projector_norm=vision.get("use_additional_post_layernorm", False),
        condition_projector=head.get("projector_type", "linear"),
        condition_projector_depth=head.get("projector_depth", 1),
        select_layer=vision.get("select_layer", -2),
        max_sequence_length=original["max_position_embeddings"],
        loss_weight_lm=original["loss_weight_lm"],
        loss_weight_vm=original["loss_weight_vm"],
        loss_scale_schedule=original["loss_scale_schedule"],
        snr_gamma=head.get("snr_gamma"),
        noise_offset=head.get("noise_offset") or 0.0,
        input_perturbation=head.get("input_perturbation") or 0.0,
        condition_dropout=head.get("drop_prob") or 0.0,
        compat=compat,
    )


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The language model's tensors, and each plug-in's by file name."""
    everything = read_folder(folder, (SAFETENSORS, PICKLE))
    plugins: dict[str, dict[str, Tensor]] = {}
    for file, prefix in PLUGIN_PREFIXES.items():
        gathered = {k.removeprefix(prefix): everything.pop(k) for k in list(everything) if k.startswith(prefix)}
        if (folder / file).is_file():
            plugins[file] = read_file(folder / file)
        elif (folder / LEGACY_FILES[file]).is_file():
            legacy = _legacy_names(file, read_file(folder / LEGACY_FILES[file]))
            plugins[file] = {**gathered, **legacy}
        elif gathered:
            plugins[file] = gathered
        else:
            raise CheckpointError(f"{folder} has neither {file} nor {LEGACY_FILES[file]} nor {prefix}* tensors")
    return everything, plugins


def _legacy_names(file: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if file == DREAM_FILE:
        return {"dream_queries": next(iter(tensors.values()))} if len(tensors) == 1 else tensors
    return {f"{PROJECTOR}{PROJECTOR}{name.split('.')[-1]}": t for name, t in tensors.items()}


def _load(model: DreamLLM, language: dict[str, Tensor], plugins: dict[str, dict[str, Tensor]], folder: Path) -> None:
    load_into(model.language_model, language, str(folder), ignore=(ROTARY_BUFFER,))
    vision = plugins[CLIP_FILE]
    encoder = {k.removeprefix("clip_vision_model."): v for k, v in vision.items() if k.startswith("clip_vision_model.")}
    encoder = vision_names(encoder, model.vision_model.state_dict())
    load_into(model.vision_model, encoder, f"{folder}/{CLIP_FILE}", ignore=(POSITION_BUFFER,))
    load_into(model.visual_projector, _projector(vision), f"{folder}/{CLIP_FILE} (projector)")
    _load_queries(model, plugins[DREAM_FILE], folder)
    head = plugins[HEAD_FILE]
    load_into(model.condition_projector, _projector(head), f"{folder}/{HEAD_FILE} (projector)")
    for part, module in (("unet", model.unet), ("vae", model.vae)):
        tensors = {k.removeprefix(f"{part}."): v for k, v in head.items() if k.startswith(f"{part}.")}
        load_into(module, tensors, f"{folder}/{HEAD_FILE} ({part})")


def _projector(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(PROJECTOR): v for k, v in tensors.items() if k.startswith(PROJECTOR)}


def _load_queries(model: DreamLLM, tensors: dict[str, Tensor], folder: Path) -> None:
    queries = tensors.get("dream_queries")
    expected = (1, *model.dream_queries.shape)
    if queries is None or tuple(queries.shape) != expected:
        found = "missing" if queries is None else f"found {list(queries.shape)}"
        raise CheckpointError(f"{folder}/{DREAM_FILE}: dream_queries, expected {list(expected)}, {found}")
    model.dream_queries.data.copy_(queries[0])


# -- writing ------------------------------------------------------------


def _language_tensors(model: DreamLLM) -> dict[str, Tensor]:
    tensors = {k: v.contiguous() for k, v in model.language_model.state_dict().items()}
    frequencies = model.decoder.get_buffer("rotary_emb.inv_freq")
    for i in range(model.config.text_config.num_hidden_layers):
        tensors[f"model.layers.{i}.self_attn.{ROTARY_BUFFER}"] = frequencies.to(model.dtype).clone()
    return tensors


def _plugin_tensors(model: DreamLLM) -> dict[str, dict[str, Tensor]]:
    vision = {CLIP_TENSORS + k.removeprefix("vision_model."): v for k, v in model.vision_model.state_dict().items()}
    vision |= {PROJECTOR + k: v for k, v in model.visual_projector.state_dict().items()}
    head = {f"vae.{k}": v for k, v in model.vae.state_dict().items()}
    head |= {f"unet.{k}": v for k, v in model.unet.state_dict().items()}
    head |= {PROJECTOR + k: v for k, v in model.condition_projector.state_dict().items()}
    return {CLIP_FILE: vision, DREAM_FILE: {"dream_queries": model.dream_queries.detach()[None]}, HEAD_FILE: head}


def _update_record(model: DreamLLM, record: dict[str, Any]) -> dict[str, Any]:
    text = model.config.text_config.to_dict()
    out = {**record, **{name: text[name] for name in _TEXT_FIELDS if name in text and name in record}}
    out["rope_theta"] = _rope_theta(text)
    out |= {name: getattr(model.config, name) for name in ("loss_weight_lm", "loss_weight_vm", "loss_scale_schedule")}
    out["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    return out


def _rope_theta(text: dict[str, Any]) -> float:
    return (text.get("rope_parameters") or {}).get("rope_theta", 10000.0)


def _new_record(config: DreamLLMConfig, processor: DreamLLMProcessor) -> dict[str, Any]:
    """A configuration for a model that did not come from the original."""
    text = config.text_config.to_dict()
    module = "omni.models.dreamllm.modeling_plugins."
    hidden = config.hidden_size
    plugins = {
        "clip_vision_embedding": {
            "_target_": module + "CLIPVisionEmbedding",
            "clip_vision_model_name_or_path": "openai/clip-vit-large-patch14",
            "projector_type": config.visual_projector,
            "projector_depth": config.visual_projector_depth,
            "select_layer": config.select_layer,
            "embed_hidden_size": hidden,
            "use_additional_post_layernorm": config.visual_projector_norm,
            "freeze_clip_vision_model": True,
            "freeze_embedding_layers": True,
            "freeze_projector": False,
        },
        "dream_embedding": {
            "_target_": module + "DreamEmbedding",
            "num_dream_queries": config.num_dream_queries,
            "embed_hidden_size": hidden,
            "freeze_dream_queries": False,
        },
        "stable_diffusion_head": {
            "_target_": module + "StableDiffusionHead",
            "diffusion_name_or_path": "stabilityai/stable-diffusion-2-1-base",
            "projector_type": config.condition_projector,
            "projector_depth": config.condition_projector_depth,
            "embed_hidden_size": hidden,
            "drop_prob": config.condition_dropout or None,
            "noise_offset": config.noise_offset,
            "input_perturbation": config.input_perturbation,
            "snr_gamma": config.snr_gamma,
            "freeze_vae": True,
            "freeze_unet": True,
            "freeze_projector": False,
        },
    }
    vocabulary = processor.tokenizer.get_vocab()
    names = ("<image>", "<im_patch>", "<im_start>", "<im_end>", "<dream>", "<dream_start>", "<dream_end>")
    tokenizer = processor.tokenizer
    ids = {t: vocabulary[t] for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)}
    return {
        "architectures": ["DreamLLMForCausalMLM"],
        "model_type": "dreamllm",
        **{name: text.get(name) for name in _TEXT_FIELDS},
        "rope_theta": _rope_theta(text),
        "bos_token_id": config.token_ids["bos"],
        "eos_token_id": config.token_ids["eos"],
        "pad_token_id": config.token_ids["pad"],
        "log_attentions": False,
        "log_hidden_states": False,
        "loss_scale_schedule": config.loss_scale_schedule,
        "loss_weight_lm": config.loss_weight_lm,
        "loss_weight_vm": config.loss_weight_vm,
        "plugins_init_kwargs": plugins,
        "plugins_type": {
            "clip_vision_embedding": "embedding",
            "dream_embedding": "embedding",
            "stable_diffusion_head": "head",
        },
        "special_tokens2ids_dict": {**ids, "additional_special_tokens": {n: vocabulary[n] for n in names}},
        "use_cache": True,
    }
