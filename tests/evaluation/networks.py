"""Networks that judge drawn pictures, with random weights, in the form of their published files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from dreamllm.evaluation.metrics import FidInception
from tests.golden import reference


def random_inception() -> FidInception:
    """The FID network whose features differ from picture to picture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FidInception().eval()
        for name, parameter in network.named_parameters():
            if name.endswith("bn.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return network


def write_clip(folder: Path) -> None:
    """A CLIP model for pictures of 16 pixels and texts of 12 words."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 800, "max_position_embeddings": 12,
            "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    preprocessor = json.loads((reference.CLIP / "preprocessor_config.json").read_text())
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | sizes))
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "dog", "cat", "on", "the", "beach"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_statistics(path: Path, variance: float) -> np.ndarray:
    """Features of the given variance that do not depend on each other; returns their mean, float64 [2048]."""
    mean = np.random.default_rng(0).uniform(0, 1, 2048)
    np.savez(path, mu=mean, sigma=variance * np.eye(2048))
    return mean
