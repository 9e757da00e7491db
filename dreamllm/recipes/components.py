"""Small components made from a set of captioned pictures: what DreamLLM otherwise takes ready-made.

Each function trains one component for a short time and writes the folder that `assemble` reads. A folder that is there
is complete and is kept. All are functions of their inputs and the seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dreamllm.data import derive_seed
from dreamllm.model import AssembleOptions, assemble
from dreamllm.model.processor import SENTENCEPIECE_FILE, CLIPImageProcessorPil
from dreamllm.training.files import write_folder
from dreamllm.training.progress import StageProgress

_WORD = re.compile(r"\w+")
_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a component trains: AdamW with `learning_rate` falling to 0 along half a cosine."""

    steps: int
    batch_size: int
    learning_rate: float


def write_start(folder: Path, components: Path, options: AssembleOptions, seed: int) -> Path:
    """Assembles `components` (its subfolders llm, clip and diffusion) into the model folder that stage I starts from.

    New weights follow from `seed`. Returns `folder`; one that is there is kept. Raises `ValueError` naming the
    subfolders that are missing.
    """
    if folder.is_dir():
        return folder
    llm, clip, diffusion = (components / name for name in ("llm", "clip", "diffusion"))
    absent = [part.name for part in (llm, clip, diffusion) if not part.is_dir()]
    if absent:
        raise ValueError(
            f"components folder {components} lacks {', '.join(absent)}; llm, clip and diffusion are needed"
        )
    options = replace(options, seed=derive_seed(seed, "assemble") % (1 << 31))
    model, processor = assemble(llm, clip, diffusion, options)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        processor.save_pretrained(target)

    write_folder(folder, fill, "the assembled model")
    return folder


def write_language_model(
    folder: Path,
    texts: Sequence[str],
    config: dict[str, Any],
    vocab_size: int,
    schedule: Schedule,
    seed: int,
    console: Console | None = None,
) -> None:
    """A sentencepiece tokenizer and a LLaMA (`config`: `LlamaConfig` fields) trained on `texts`, as a model folder.

    `vocab_size` bounds the tokenizer; a small set of texts gives fewer pieces. Bytes stand for unseen characters.
    """
    if folder.is_dir():
        return
    proto = train_tokenizer(texts, vocab_size)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    llama = LlamaConfig(**config, vocab_size=pieces.get_piece_size(), bos_token_id=1, eos_token_id=2)
    longest = llama.max_position_embeddings
    sequences = [torch.tensor([1, *pieces.encode(text), 2][:longest]) for text in texts]
    with seeded(seed, "llm"):
        model = LlamaForCausalLM(llama)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        ids = nn.utils.rnn.pad_sequence([sequences[i] for i in rows], batch_first=True, padding_value=-100)
        return model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids).loss

    optimise("language model", model, len(texts), schedule, loss, derive_seed(seed, "llm"), console)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        (target / SENTENCEPIECE_FILE).write_bytes(proto)
        (target / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")

    write_folder(folder, fill, "the language model")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """A byte-pair sentencepiece model with byte fallback and LLaMA's three special tokens; at most `vocab_size`."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=proto,
        vocab_size=vocab_size,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return proto.getvalue()


def write_vision_encoder(
    folder: Path,
    pixel_values: Tensor,
    captions: Sequence[str],
    config: dict[str, Any],
    image_processor: CLIPImageProcessorPil,
    schedule: Schedule,
    seed: int,
    console: Console | None = None,
) -> None:
    """A CLIP vision model (`config`: `CLIPVisionConfig` fields) trained against the captions' bags of words.

    pixel_values float32 [N, 3, h, w] from `image_processor`. The contrastive loss (Radford et al. 2021) takes pictures
    with equal captions as equally right. It reaches the patch features of the last layer but one, which DreamLLM reads.
    """
    if folder.is_dir():
        return
    vision = CLIPVisionConfig(**config)
    words = WordTable(captions)
    with seeded(seed, "clip"):
        model = CLIPVisionModel(vision)
        pictures = nn.Linear(2 * vision.hidden_size, vision.hidden_size)
        texts = nn.EmbeddingBag(len(words), vision.hidden_size, mode="mean", padding_idx=0)
    scale = nn.Parameter(torch.tensor(math.log(10.0)))
    captions_NL = words.rows(captions)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        output = model(pixel_values[rows], output_hidden_states=True)
        patches = output.hidden_states[-2][:, 1:].mean(1)
        picture_BH = F.normalize(pictures(torch.cat([output.pooler_output, patches], 1)), dim=1)
        text_BH = F.normalize(texts(captions_NL[rows]), dim=1)
        same = (captions_NL[rows][:, None] == captions_NL[rows][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        logits = scale.exp().clamp(max=100.0) * picture_BH @ text_BH.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    trained = nn.ModuleList([model, pictures, texts, nn.ParameterList([scale])])
    optimise("vision encoder", trained, len(captions), schedule, loss, derive_seed(seed, "clip"), console)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        image_processor.save_pretrained(target)

    write_folder(folder, fill, "the vision encoder")


def write_denoiser(
    folder: Path,
    pictures: Tensor,
    captions: Sequence[str],
    config: dict[str, Any],
    scheduler: Any,
    schedule: Schedule,
    seed: int,
    condition_dropout: float = 0.1,
    console: Console | None = None,
) -> None:
    """A UNet (`config`: `UNet2DConditionModel` arguments) that denoises pixels given a caption's words.

    pictures float32 [N, C, size, size] in [-1, 1]; there is no VAE (the codec is the identity). The condition is the
    sequence of the caption's word embeddings with positions, dropped with probability `condition_dropout`. `scheduler`,
    a diffusers `DDPMScheduler`, is stored with the UNet.
    """
    if folder.is_dir():
        return
    channels, size = pictures.shape[1:3]
    words = WordTable(captions)
    captions_NL = words.rows(captions)
    width = config["cross_attention_dim"]
    with seeded(seed, "unet"):
        unet: Any = UNet2DConditionModel(in_channels=channels, out_channels=channels, sample_size=size, **config)
        word = nn.Embedding(len(words), width)
        position = nn.Embedding(captions_NL.shape[1], width)

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        clean = pictures[rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        keep = torch.rand(len(rows), 1, generator=generator) >= condition_dropout
        condition = word(captions_NL[rows] * keep) + position.weight
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, condition).sample
        return F.mse_loss(predicted, noise)

    trained = nn.ModuleList([unet, word, position])
    optimise("picture decoder", trained, len(captions), schedule, loss, derive_seed(seed, "unet"), console)

    def fill(target: Path) -> None:
        unet.save_pretrained(target / "unet")
        scheduler.save_pretrained(target / "scheduler")
        (target / "model_index.json").write_text(json.dumps({"codec": "identity"}) + "\n")

    write_folder(folder, fill, "the picture decoder")


class WordTable:
    """The most frequent words of some captions, numbered from 2; 0 is padding, 1 any other word."""

    def __init__(self, captions: Sequence[str], limit: int = 4096, longest: int = 16) -> None:
        counts = Counter(word for caption in captions for word in _words(caption))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
        self.numbers = {word: i + 2 for i, word in enumerate(ranked)}
        self.longest = longest

    def __len__(self) -> int:
        return len(self.numbers) + 2

    def rows(self, captions: Sequence[str]) -> Tensor:
        """int64 [N, L], L the longest caption's number of words (at most `longest`)."""
        numbers = [[self.numbers.get(w, 1) for w in _words(c)][: self.longest] or [1] for c in captions]
        length = max(map(len, numbers))
        return torch.tensor([row + [0] * (length - len(row)) for row in numbers])


def _words(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def optimise(
    label: str,
    module: nn.Module,
    count: int,
    schedule: Schedule,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    seed: int,
    console: Console | None = None,
) -> None:
    """Trains `module` on `count` samples: `loss(rows, generator)` of random rows int64 [batch]."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
    module.train()
    started = time.perf_counter()
    with StageProgress(console or Console(), label, schedule.steps, 0) as progress:
        for step in range(1, schedule.steps + 1):
            rows = torch.randint(0, count, (schedule.batch_size,), generator=generator)
            value = loss(rows, generator)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            decay.step()
            progress.advance()
            if step % 10 == 0 or step == schedule.steps:
                speed = step * schedule.batch_size / (time.perf_counter() - started)
                progress.show(step, f"loss {value.item():.3f} {speed:.0f} samples/s")
    module.eval()


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Initial weights drawn inside are a function of (seed, name); the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, name, "weights"))
        yield
