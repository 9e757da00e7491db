"""What DreamLLM does all day, as benchmark cases: ours against the original's pattern, same weights, same documents.

A call of a training case is one optimiser step on one batch that is ready on the device: loading and transforming
pictures happens in worker processes in both programs. Draws of noise, time steps and posterior samples are the same. A
call of an inference case goes from the prompt's document (ours) or ids and pixels (the pattern) to tokens or PIL
pictures. Where everything is bfloat16, what may differ is derived in rounding.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import Call, Case
from benchmarks.models.rounding import loss_tolerances, picture_tolerance, poor_choice
from benchmarks.models.setting import LARGE, Setting
from benchmarks.original_pattern import OriginalPattern, PaddedBatch, Trainer, draw, pad_batch, write
from dreamllm.documents import Document, EncodedDocument, PackedBatch
from dreamllm.inference import DrawingOptions, Engine, GenerationOptions
from dreamllm.inference.drawing import picture_seed
from dreamllm.model import DreamLLM
from dreamllm.model.codec import encode_pictures
from dreamllm.training import StageConfig
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import STAGES, SyntheticDocuments

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


def training_case(setting: Setting, kind: str, batch: int = 8, cached: bool = False, compiled: bool = True) -> Case:
    """One step of stage `kind` on `batch` documents. `cached`: ours gets the pictures' latents, as from a cache."""
    stage = training_stage(kind, batch)
    size, device = setting.size, setting.device
    processor = setting.processor()
    encoded = [processor.encode(document) for document in stage_documents(kind, size, batch)]
    packed = processor.pack(encoded).to(device)

    def padded_batch(documents: Sequence[EncodedDocument]) -> PaddedBatch:
        return pad_batch(documents, processor.layout, processor).to(device)

    padded = padded_batch(encoded)
    ours = setting.model()
    theirs = Trainer(OriginalPattern(ours), stage)
    tolerance: float | tuple[float, ...] = LOSS_TOLERANCE
    if setting.rounds:
        tolerance = loss_tolerances(theirs, [padded_batch([document]) for document in encoded], setting)
    contenders: dict[str, Call] = {OURS: _our_step(ours, setting, stage, packed, cached)}
    if "language_model" in stage.groups:
        keeping = setting.model()
        contenders[KEEPING] = _our_step(keeping, setting, stage, packed, cached)
        keeping.use_less_memory("none")

    def their_step(trainer: Trainer) -> list[Tensor]:
        return list(map(torch.tensor, trainer.step(padded, setting.generator())))

    contenders[PATTERN] = lambda: their_step(theirs)
    if compiled:
        compiled_trainer = made_once(lambda: Trainer(compile_heavy(OriginalPattern(setting.model())), stage))
        contenders[COMPILED] = lambda: their_step(compiled_trainer())
    label = f"{'latents cached, ' if cached else ''}{batch} documents, {packed.num_tokens} tokens"
    label += f" (padded: {padded.input_ids.numel()}), {len(packed.dream_positions)} pictures to draw"
    return Case(
        f"{size} {kind}",
        setting.note + label,
        list,
        contenders,
        bytes_moved=0,  # a step of small matrices is like no copy
        flops=0,
        relative_tolerance=tolerance,
        device=device,
        samples=batch,
        memory=kind == "stage2",
        fallible=(COMPILED,),
        end_to_end=True,
        part=setting.part,
    )


def training_stage(kind: str, documents: int) -> StageConfig:
    rate = STAGES[kind].learning_rate
    return StageConfig(kind, STAGES[kind].kind, (), 1000, learning_rate=rate, documents_per_step=documents)


Made = TypeVar("Made")


def made_once(make: Callable[[], Made]) -> Callable[[], Made]:
    """`make` when first called, so that a contender that is left out takes no memory; what it gave from then on."""
    made: list[Made] = []

    def get() -> Made:
        if not made:
            made.append(make())
        return made[0]

    return get


def _our_step(model: DreamLLM, setting: Setting, stage: StageConfig, batch: PackedBatch, cached: bool) -> Call:
    optimizer = make_optimizer(prepare_model(model, stage), stage)
    model.use_less_memory()  # as a run does by default
    generator = setting.generator()
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


def captioning_case(setting: Setting, num_beams: int = 1, new_tokens: int = 32, compiled: bool = True) -> Case:
    """One picture and a question -> `new_tokens` tokens, greedily or with beams.

    In float32 the tokens must be equal. In bfloat16 greedy ones must be as likely as rounding allows, and beams, where
    one such choice changes all that follows, must have the length.
    """
    processor = setting.processor()
    ours = setting.model()
    ours.requires_grad_(False)  # as `dreamllm.inference.load` does
    document = SyntheticDocuments("picture prompt", setting.size, 1)[0]
    engine = Engine(ours, processor)
    batch = processor.pad([processor.encode(document)])
    inputs = [batch[name].to(setting.device) for name in ("input_ids", "attention_mask", "pixel_values")]
    never = [*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start]
    theirs = OriginalPattern(ours)

    def our_tokens() -> Tensor:
        return _answer(engine, document, new_tokens, num_beams)

    def their_tokens(pattern: OriginalPattern) -> Tensor:
        return write(pattern, *inputs, new_tokens, num_beams, never)[0]

    def wrong(results: Sequence[Tensor]) -> str:
        (tokens,) = results
        if tokens.shape != (new_tokens,) or set(tokens.tolist()) & set(never):
            return f"{tokens.tolist()} are not {new_tokens} tokens that may be chosen"
        return poor_choice(theirs, inputs, tokens, [*never, engine.layout.eos]) if num_beams == 1 else ""

    contenders: dict[str, Call] = {OURS: our_tokens, PATTERN: lambda: their_tokens(theirs)}
    if compiled:
        compiled_pattern = made_once(lambda: compile_heavy(OriginalPattern(setting.model())))
        contenders[COMPILED] = lambda: their_tokens(compiled_pattern())
    return Case(
        f"{setting.size} captioning",
        f"{setting.note}{'greedy' if num_beams == 1 else f'{num_beams} beams'}, one picture, {new_tokens} tokens",
        list,
        contenders,
        bytes_moved=_bytes_read(ours.language_model, new_tokens, setting),
        flops=0,
        relative_tolerance=0.0,
        device=setting.device,
        samples=1,
        fallible=(COMPILED,),
        wrong=wrong if setting.rounds else None,
        end_to_end=True,
    )


def _bytes_read(model: torch.nn.Module, times: int, setting: Setting) -> int:
    """By `times` passes over a model's weights. Nothing at 7b: the harness copies as many bytes for comparison."""
    if setting.size == LARGE:
        return 0
    return times * sum(p.numel() * p.element_size() for p in model.parameters())


def _answer(engine: Engine, document: Document, new_tokens: int, num_beams: int) -> Tensor:
    options = GenerationOptions(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pictures="forbid", num_beams=num_beams
    )
    return torch.tensor(engine.answer(document, options).token_ids)


# -- drawing -----------------------------------------------------------------------------------------------------------


def drawing_case(
    setting: Setting,
    prompts: int = 4,
    candidates: int = 1,
    steps: int = 50,
    guidance_scale: float = 2.0,
    compiled: bool = True,
) -> Case:
    """Prompts -> pictures, guided. To the pattern a candidate is one more row of the batch with the same prompt: the
    original draws its candidates in separate runs, but over batches as large as ours."""
    processor = setting.processor()
    ours = setting.model()
    reader = SyntheticDocuments("drawing prompt", setting.size, prompts)
    documents = [reader[i] for i in range(prompts)]
    ids = [processor.encode(document).input_ids for document in documents]
    theirs = OriginalPattern(ours)
    ours.requires_grad_(False)
    engine = Engine(ours, processor)
    drawing = DrawingOptions(steps=steps, guidance_scale=guidance_scale, candidates=candidates)
    options = GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing)

    def our_pictures() -> list[Tensor]:
        answers = engine.answers(documents, options, range(prompts))
        return [_pixels(picture) for answer in answers for picture in answer.pictures]

    rows = [row for row in ids for _ in range(candidates)]
    seeds = [picture_seed(seed, candidate) for seed in range(prompts) for candidate in range(candidates)]

    def their_pictures(pattern: OriginalPattern, first: int | None = None) -> list[Tensor]:
        return [_pixels(picture) for picture in draw(pattern, rows[:first], seeds[:first], steps, guidance_scale)]

    tolerance = PICTURE_TOLERANCE
    if setting.rounds:
        tolerance = picture_tolerance(lambda: their_pictures(theirs, 2), theirs, PICTURE_TOLERANCE)
    contenders: dict[str, Call] = {OURS: our_pictures, PATTERN: lambda: their_pictures(theirs)}
    if compiled:
        compiled_pattern = made_once(lambda: compile_heavy(OriginalPattern(setting.model())))
        contenders[COMPILED] = lambda: their_pictures(compiled_pattern())
    many = f", {candidates} candidates each" if candidates > 1 else ""
    return Case(
        f"{setting.size} text_to_image",
        f"{setting.note}{prompts} prompt{'s' if prompts > 1 else ''}{many}, {steps} guided steps",
        list,
        contenders,
        bytes_moved=_bytes_read(ours.unet, steps, setting),
        flops=0,
        relative_tolerance=tolerance,
        device=setting.device,
        samples=prompts * candidates,
        least_rounds=least_rounds(setting),
        fallible=(COMPILED,),
        end_to_end=True,
    )


def least_rounds(setting: Setting) -> int:
    """Of seconds each. On a GPU of one's own two calls differ by a percent; on a shared processor by ten."""
    return 2 if setting.device == "cuda" else 5


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255


# -- torch.compile -----------------------------------------------------------------------------------------------------


MOST_SHAPES = 64


def compile_heavy(pattern: OriginalPattern) -> OriginalPattern:
    """Compiles, in place, the modules where the pattern's time goes: layers of the decoder and of CLIP, and the UNet's
    and the VAE's residual and transformer blocks. Whole models would take many minutes on a CPU."""
    # A UNet's blocks come in more shapes than dynamo compiles by default; the others would silently run eagerly.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    heavy = {"LlamaDecoderLayer", "CLIPEncoderLayer", "ResnetBlock2D", "BasicTransformerBlock"}
    for module in pattern.modules():
        if type(module).__name__ in heavy:
            module.compile()
    return pattern


# -- all of them -------------------------------------------------------------------------------------------------------


def workloads(
    setting: Setting, compiled: bool = True, layer_counts: Sequence[int] = (), steps: int = 50
) -> dict[str, Callable[[], Case]]:
    """Every workload by name; each makes its own models when called. `compiled`: with the compiled pattern.

    `layer_counts`: of the decoder, in stages that train it, which do not fit whole; one workload each. `steps`: of
    denoising.
    """

    def training(kind: str, cached: bool = False, where: Setting = setting) -> Callable[[], Case]:
        return lambda: training_case(where, kind, cached=cached, compiled=compiled)

    parts = {f"_{count}_layers": setting.with_layers(count) for count in layer_counts} or {"": setting}
    return {
        "comprehension": training("stage1_comprehension"),
        "creation_cached": training("stage1_creation", cached=True),
        "creation_online": training("stage1_creation"),
        **{
            f"{kind}{name}": training(kind, where=part) for kind in ("stage2", "stage3") for name, part in parts.items()
        },
        "captioning_greedy": lambda: captioning_case(setting, compiled=compiled),
        "captioning_beams": lambda: captioning_case(setting, num_beams=5, compiled=compiled),
        "text_to_image": lambda: drawing_case(setting, steps=steps, compiled=compiled),
        "candidates": lambda: drawing_case(setting, prompts=1, candidates=8, steps=steps, compiled=compiled),
    }
