"""What DreamLLM does all day, as benchmark cases: ours against the original's pattern, same weights, same documents.

A call of a training case is one optimiser step on one batch that is ready in memory: loading and transforming pictures
happens in worker processes in both programs. Draws of noise, time steps and posterior samples are the same. A call of
an inference case goes from the prompt's document (ours) or ids and pixels (the pattern) to tokens or PIL pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import Call, Case
from benchmarks.original_pattern import OriginalPattern, Trainer, draw, pad_batch, write
from dreamllm.documents import Document, PackedBatch
from dreamllm.inference import DrawingOptions, Engine, GenerationOptions
from dreamllm.inference.drawing import picture_seed
from dreamllm.model import DreamLLM
from dreamllm.model.codec import encode_pictures
from dreamllm.training import StageConfig
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import STAGES, SyntheticDocuments, make_model, make_processor

OURS, KEEPING, PATTERN, COMPILED = (
    "dreamllm",
    "dreamllm, nothing recomputed",
    "original pattern",
    "original pattern, torch.compile",
)
LOSS_TOLERANCE = 1e-4
PICTURE_TOLERANCE = 2.5 / 255  # two levels of 8 bits


# -- training ----------------------------------------------------------------------------------------------------------


# The kinds of a step's documents, taken in turn: halves of stage II as in the paper, and 80K : 20K : 20K of stage III.
_KINDS = {
    "stage1_comprehension": ("comprehension pair",),
    "stage1_creation": ("creation pair",),
    "stage2": ("comprehension pair", "interleaved", "creation pair", "interleaved"),
    "stage3": (*("conversation",) * 2, "drawing order", *("conversation",) * 2, "interleaved order"),
}


def stage_documents(stage: str, size: str, count: int, seed: int = 0) -> list[Document]:
    """`count` documents of a stage's kinds, of lengths as in the paper's data."""
    kinds = [_KINDS[stage][i % len(_KINDS[stage])] for i in range(count)]
    readers = {kind: SyntheticDocuments(kind, size, count, seed) for kind in set(kinds)}
    return [readers[kind][i] for i, kind in enumerate(kinds)]


def training_case(size: str, kind: str, batch: int = 8, cached: bool = False, compiled: bool = True) -> Case:
    """One step of stage `kind` on `batch` documents. `cached`: ours gets the pictures' latents, as from a cache."""
    stage = StageConfig(
        kind, STAGES[kind].kind, (), 1000, learning_rate=STAGES[kind].learning_rate, documents_per_step=batch
    )
    processor = make_processor(size)
    encoded = [processor.encode(document) for document in stage_documents(kind, size, batch)]
    packed = processor.pack(encoded)
    padded = pad_batch(encoded, processor.layout, processor)
    ours = make_model(size).eval()
    trainers = {PATTERN: Trainer(OriginalPattern(ours), stage)}
    if compiled:
        trainers[COMPILED] = Trainer(compile_heavy(OriginalPattern(ours)), stage)
    contenders: dict[str, Call] = {OURS: _our_step(ours, stage, packed, cached)}
    if kind in ("stage2", "stage3"):
        keeping = make_model(size).eval()
        contenders[KEEPING] = _our_step(keeping, stage, packed, cached)
        keeping.use_less_memory("none")
    for name, trainer in trainers.items():
        contenders[name] = lambda trainer=trainer: list(map(torch.tensor, trainer.step(padded, _generator())))
    label = f"{'latents cached, ' if cached else ''}{batch} documents, {packed.num_tokens} tokens"
    label += f" (padded: {padded.input_ids.numel()}), {len(packed.dream_positions)} pictures to draw"
    return Case(
        f"{size} {kind}",
        label,
        list,
        contenders,
        bytes_moved=0,  # a step of small matrices is like no copy
        flops=0,
        relative_tolerance=LOSS_TOLERANCE,
        samples=batch,
        memory=kind == "stage2",
        fallible=(COMPILED,),
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _our_step(model: DreamLLM, stage: StageConfig, batch: PackedBatch, cached: bool) -> Call:
    optimizer = make_optimizer(prepare_model(model, stage), stage)
    model.use_less_memory()  # as a run does by default
    generator = _generator()
    if cached:
        assert batch.target_pixel_values is not None
        with torch.no_grad():
            latents = encode_pictures(model.vae, batch.target_pixel_values, generator)
        batch = replace(batch, target_pixel_values=None, target_latents=latents)
    state = generator.get_state()

    def step() -> Sequence[Tensor]:
        generator.set_state(state)
        return train_step(model, optimizer, [batch], stage, generator, contextlib.nullcontext()).unbind()

    return step


# -- writing -----------------------------------------------------------------------------------------------------------


def captioning_case(size: str, num_beams: int = 1, new_tokens: int = 32, compiled: bool = True) -> Case:
    """One picture and a question -> `new_tokens` tokens, greedily or with beams."""
    processor = make_processor(size)
    ours = make_model(size).eval()
    ours.requires_grad_(False)  # as `dreamllm.inference.load` does
    document = SyntheticDocuments("picture prompt", size, 1)[0]
    engine = Engine(ours, processor)
    batch = processor.pad([processor.encode(document)])
    inputs = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    never = [*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start]
    patterns = {PATTERN: OriginalPattern(ours)}
    if compiled:
        patterns[COMPILED] = compile_heavy(OriginalPattern(ours))

    def our_tokens() -> Tensor:
        return _answer(engine, document, new_tokens, num_beams)

    contenders: dict[str, Call] = {OURS: our_tokens}
    for name, pattern in patterns.items():
        contenders[name] = lambda pattern=pattern: write(pattern, *inputs, new_tokens, num_beams, never)[0]
    return Case(
        f"{size} captioning",
        f"{'greedy' if num_beams == 1 else f'{num_beams} beams'}, one picture, {new_tokens} tokens",
        list,
        contenders,
        bytes_moved=new_tokens * sum(p.numel() * p.element_size() for p in ours.language_model.parameters()),
        flops=0,
        relative_tolerance=0.0,
        samples=1,
        fallible=(COMPILED,),
    )


def _answer(engine: Engine, document: Document, new_tokens: int, num_beams: int) -> Tensor:
    options = GenerationOptions(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pictures="forbid", num_beams=num_beams
    )
    return torch.tensor(engine.answer(document, options).token_ids)


# -- drawing -----------------------------------------------------------------------------------------------------------


def drawing_case(
    size: str,
    prompts: int = 4,
    candidates: int = 1,
    steps: int = 50,
    guidance_scale: float = 2.0,
    compiled: bool = True,
) -> Case:
    """Prompts -> pictures, guided. To the pattern a candidate is one more row of the batch with the same prompt: the
    original draws its candidates in separate runs, but over batches as large as ours."""
    processor = make_processor(size)
    ours = make_model(size).eval()
    reader = SyntheticDocuments("drawing prompt", size, prompts)
    documents = [reader[i] for i in range(prompts)]
    ids = [processor.encode(document).input_ids for document in documents]
    patterns = {PATTERN: OriginalPattern(ours)}
    if compiled:
        patterns[COMPILED] = compile_heavy(OriginalPattern(ours))
    ours.requires_grad_(False)
    engine = Engine(ours, processor)
    drawing = DrawingOptions(steps=steps, guidance_scale=guidance_scale, candidates=candidates)
    options = GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing)

    def our_pictures() -> list[Tensor]:
        answers = engine.answers(documents, options, range(prompts))
        return [_pixels(picture) for answer in answers for picture in answer.pictures]

    rows = [row for row in ids for _ in range(candidates)]
    seeds = [picture_seed(seed, candidate) for seed in range(prompts) for candidate in range(candidates)]

    def their_pictures(pattern: OriginalPattern) -> list[Tensor]:
        return [_pixels(picture) for picture in draw(pattern, rows, seeds, steps, guidance_scale)]

    contenders: dict[str, Call] = {OURS: our_pictures}
    for name, pattern in patterns.items():
        contenders[name] = lambda pattern=pattern: their_pictures(pattern)
    many = f", {candidates} candidates each" if candidates > 1 else ""
    return Case(
        f"{size} text_to_image",
        f"{prompts} prompt{'s' if prompts > 1 else ''}{many}, {steps} guided steps",
        list,
        contenders,
        bytes_moved=steps * sum(p.numel() * p.element_size() for p in ours.unet.parameters()),
        flops=0,
        relative_tolerance=PICTURE_TOLERANCE,
        samples=prompts * candidates,
        fallible=(COMPILED,),
    )


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255


# -- torch.compile -----------------------------------------------------------------------------------------------------


def compile_heavy(pattern: OriginalPattern) -> OriginalPattern:
    """Compiles, in place, the modules where the pattern's time goes: layers of the decoder and of CLIP, and the UNet's
    and the VAE's residual and transformer blocks. Whole models would take many minutes on a CPU."""
    heavy = {"LlamaDecoderLayer", "CLIPEncoderLayer", "ResnetBlock2D", "BasicTransformerBlock"}
    for module in pattern.modules():
        if type(module).__name__ in heavy:
            module.compile()
    return pattern


# -- all of them -------------------------------------------------------------------------------------------------------


def workloads(size: str, compiled: bool = True) -> dict[str, Callable[[], Case]]:
    """Every workload by name; each makes its own models when called. `compiled`: with the compiled pattern."""

    def training(kind: str, cached: bool = False) -> Callable[[], Case]:
        return lambda: training_case(size, kind, cached=cached, compiled=compiled)

    return {
        "comprehension": training("stage1_comprehension"),
        "creation_cached": training("stage1_creation", cached=True),
        "creation_online": training("stage1_creation"),
        "stage2": training("stage2"),
        "stage3": training("stage3"),
        "captioning_greedy": lambda: captioning_case(size, compiled=compiled),
        "captioning_beams": lambda: captioning_case(size, num_beams=5, compiled=compiled),
        "text_to_image": lambda: drawing_case(size, compiled=compiled),
        "candidates": lambda: drawing_case(size, prompts=1, candidates=8, compiled=compiled),
    }
