"""The engine as benchmark cases: writing beside transformers' `generate`, requests together and one after another.

Writing runs in bfloat16, where two programs choose other tokens as soon as two are about as likely, so only the number
of tokens is compared here; that the tokens agree is tested in float32 (tests/inference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.harness import Call, Case
from benchmarks.models.rounding import picture_tolerance
from benchmarks.models.setting import Setting
from benchmarks.models.workloads import PICTURE_TOLERANCE, least_rounds
from benchmarks.original_pattern import OriginalPattern, write
from dreamllm.documents import Document, prompt
from dreamllm.inference import Answer, DrawingOptions, Engine, GenerationOptions
from dreamllm.inference.drawing import picture_seed
from dreamllm.model import DreamLLM, DreamLLMConfig, DreamLLMProcessor
from dreamllm.model.processor import ProcessorSettings, special_token_ids
from dreamllm.workloads import SyntheticDocuments, made_with, model_config, model_size
from dreamllm.workloads.sizes import make_tokenizer

TOGETHER, APART, TRANSFORMERS = "dreamllm", "one after another", "transformers generate, dynamic cache"
PATTERN = "original pattern, one after another"
# Decoders of proportions that decoding is bound by; other sizes write with their own.
WRITER = {
    "mini": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8},
    "tiny": {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2},
}
WRITER_WORDS = {"mini": 32000, "tiny": 88}


def writing_case(setting: Setting, rows: int, prompt_tokens: int = 32, new_tokens: int = 64) -> Case:
    """Greedy writing after prompts of words in bfloat16, by a decoder of `WRITER` or by the setting's own."""
    size, device = setting.size, setting.device
    model, processor = _writer(setting)
    shape = model.config.text_config
    with made_with(0, device, torch.bfloat16):
        stock = LlamaForCausalLM(shape).eval().requires_grad_(False)
    stock.load_state_dict(model.language_model.state_dict())
    generator = torch.Generator().manual_seed(0)
    words = WRITER_WORDS.get(size, model_size(size).words)
    ids = torch.randint(3, words, (rows, prompt_tokens), generator=generator)
    documents = [_words(row.tolist()) for row in ids]
    given = torch.tensor([processor.encode(document).input_ids for document in documents], device=device)
    engine = Engine(model, processor)
    options = GenerationOptions(max_new_tokens=new_tokens, min_new_tokens=new_tokens, pictures="forbid")

    def ours() -> Tensor:
        return torch.tensor([len(answer.token_ids) for answer in engine.answers(documents, options)])

    def theirs() -> Tensor:
        written = stock.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=model.layout.pad,
            eos_token_id=model.layout.eos,
        )
        return torch.full((rows,), written.shape[1] - given.shape[1])

    return Case(
        f"{size} writing",
        f"{shape.num_hidden_layers} layers of {shape.hidden_size}, bfloat16, batch {rows}, "
        f"{new_tokens} tokens; a sample is a token",
        list,
        {TOGETHER: ours, TRANSFORMERS: theirs},
        bytes_moved=0,
        flops=0,
        relative_tolerance=0.0,
        device=device,
        samples=rows * new_tokens,
        end_to_end=True,
    )


def _writer(setting: Setting) -> tuple[DreamLLM, DreamLLMProcessor]:
    """A DreamLLM of this size with another language model where `WRITER` has one, of LLaMA's vocabulary at `mini`."""
    size = setting.size
    if size not in WRITER:
        return replace(setting, dtype=torch.bfloat16).model().requires_grad_(False), setting.processor()
    tokenizer = make_tokenizer(replace(model_size(size), words=WRITER_WORDS[size]))
    base, shape = model_config(size), WRITER[size]
    text = base.text_config.to_dict() | shape
    text |= {"num_key_value_heads": shape["num_attention_heads"], "vocab_size": len(tokenizer)}
    text["head_dim"] = shape["hidden_size"] // shape["num_attention_heads"]
    config = DreamLLMConfig(
        text_config=text,
        vision_config=base.vision_config,
        unet_config=base.unet_config,
        vae_config=base.vae_config,
        scheduler_config=base.scheduler_config,
        token_ids=special_token_ids(tokenizer),
        num_dream_queries=base.num_dream_queries,
        max_sequence_length=base.max_sequence_length,
    )
    with made_with(0, setting.device, torch.bfloat16):
        model = DreamLLM(config).eval().requires_grad_(False)
    images = setting.processor().image_processor
    return model, DreamLLMProcessor(images, tokenizer, ProcessorSettings.from_config(config))


def questions_case(setting: Setting, questions: int = 8, num_beams: int = 5, new_tokens: int = 32) -> Case:
    """Questions about a picture each, answered with beams: in one batch, one by one, and one by one by `generate`, as
    the original evaluates. In float32 their tokens are equal."""
    size = setting.size
    engine = _engine(setting)
    source = SyntheticDocuments("picture prompt", size, questions)
    documents = [source[i] for i in range(questions)]
    padded = [engine.processor.pad([engine.processor.encode(document)]) for document in documents]
    names = ("input_ids", "attention_mask", "pixel_values")
    inputs = [[batch[name].to(setting.device) for name in names] for batch in padded]
    pattern = OriginalPattern(engine.model)
    never = [*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start]
    options = GenerationOptions(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pictures="forbid", num_beams=num_beams
    )

    def together() -> list[Tensor]:
        return _values(engine.answers(documents, options), setting)

    def apart() -> list[Tensor]:
        return _values([engine.answer(document, options) for document in documents], setting)

    def original() -> list[Tensor]:
        rows = torch.cat([write(pattern, *given, new_tokens, num_beams, never)[0] for given in inputs])
        return [torch.tensor([len(rows)], dtype=torch.float64) if setting.rounds else rows.double().cpu()]

    return Case(
        f"{size} questions",
        f"{setting.note}{questions} questions about a picture each, {num_beams} beams, {new_tokens} tokens; "
        "a sample is an answer",
        list,
        {TOGETHER: together, APART: apart, PATTERN: original},
        bytes_moved=new_tokens * sum(p.numel() * p.element_size() for p in engine.model.language_model.parameters()),
        flops=0,
        relative_tolerance=0.0,
        device=setting.device,
        samples=questions,
        least_rounds=least_rounds(setting),
        end_to_end=True,
    )


def mixed_case(setting: Setting, steps: int = 50, new_tokens: int = 32) -> Case:
    """16 requests: 8 captions, 4 pictures, 4 documents that begin with a picture and go on with text."""
    size = setting.size
    engine = _engine(setting)
    drawing = DrawingOptions(steps=steps, guidance_scale=2.0)
    written = GenerationOptions(max_new_tokens=new_tokens, min_new_tokens=new_tokens, pictures="forbid")
    lone = GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing)
    document = replace(lone, max_new_tokens=new_tokens, min_new_tokens=new_tokens, max_pictures=1)
    shown, asked = (SyntheticDocuments(f"{kind} prompt", size, 8) for kind in ("picture", "drawing"))
    work: list[tuple[Document, GenerationOptions]] = []
    for i in range(4):
        work += [(shown[i], written), (asked[i], lone), (asked[4 + i], document), (shown[4 + i], written)]
    prompts, options = zip(*work, strict=True)
    seeds = range(len(work))

    def together() -> list[Tensor]:
        return _values(engine.answers(prompts, options, seeds), setting)

    def apart() -> list[Tensor]:
        each = zip(prompts, options, seeds, strict=True)
        return _values([engine.answers([p], [o], [s])[0] for p, o, s in each], setting)

    return _comparison(
        f"{size} mixed requests",
        f"8 captions of {new_tokens} tokens, 4 pictures of {steps} guided steps, 4 documents of both",
        {TOGETHER: together, APART: apart},
        lambda: engine.answers(prompts[1:2], lone, seeds[1:2]),
        engine,
        setting,
        len(work),
    )


def candidates_case(setting: Setting, prompts: int = 4, candidates: int = 8, steps: int = 50) -> Case:
    """Several candidates of several prompts in one call, and in as many calls with one picture of each prompt."""
    size = setting.size
    engine = _engine(setting)
    source = SyntheticDocuments("drawing prompt", size, prompts)
    documents = [source[i] for i in range(prompts)]
    drawing = DrawingOptions(steps=steps, guidance_scale=2.0, batch_size=prompts * candidates)
    one = GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing)
    several = replace(one, drawing=replace(drawing, candidates=candidates))

    def together() -> list[Tensor]:
        return _values(engine.answers(documents, several, range(prompts)), setting)

    def apart() -> list[Tensor]:
        calls = [
            engine.answers(documents, one, [picture_seed(seed, number) for seed in range(prompts)])
            for number in range(candidates)
        ]
        return _values([call[i] for i in range(prompts) for call in calls], setting)

    return _comparison(
        f"{size} candidates",
        f"{candidates} candidates of {prompts} prompts, {steps} guided steps, against {candidates} calls",
        {TOGETHER: together, APART: apart},
        lambda: engine.answers(documents[:1], one, [0]),
        engine,
        setting,
        prompts * candidates,
    )


def inference_workloads(setting: Setting, steps: int = 50) -> dict[str, Callable[[], Case]]:
    """Every case by name; each makes its own models when called. `steps`: of denoising."""
    return {
        "inference_writing": lambda: writing_case(setting, 1),
        "inference_writing_batch": lambda: writing_case(setting, 8),
        "inference_questions": lambda: questions_case(setting),
        "inference_mixed": lambda: mixed_case(setting, steps=steps),
        "inference_candidates": lambda: candidates_case(setting, steps=steps),
    }


def _engine(setting: Setting) -> Engine:
    return Engine(setting.model().requires_grad_(False), setting.processor())


def _comparison(
    name: str,
    label: str,
    contenders: dict[str, Call],
    one_picture: Callable[[], Sequence[Answer]],
    engine: Engine,
    setting: Setting,
    samples: int,
) -> Case:
    tolerance = PICTURE_TOLERANCE
    if setting.rounds:
        tolerance = picture_tolerance(lambda: _pictures(one_picture()), engine.model, PICTURE_TOLERANCE)
    return Case(
        name,
        setting.note + label,
        list,
        contenders,
        bytes_moved=0,
        flops=0,
        relative_tolerance=tolerance,
        device=setting.device,
        samples=samples,
        least_rounds=least_rounds(setting),
        end_to_end=True,
    )


def _values(answers: Sequence[Answer], setting: Setting) -> list[Tensor]:
    """Tokens, or where everything rounds their number, then pictures, of every answer."""
    written = [token for answer in answers for token in answer.token_ids]
    tokens = [torch.tensor([len(written)] if setting.rounds else written, dtype=torch.float64)]
    return [t for t in tokens if t.numel()] + _pictures(answers)


def _pictures(answers: Sequence[Answer]) -> list[Tensor]:
    return [_pixels(picture) for answer in answers for picture in answer.pictures]


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).float() / 255


def _words(ids: Sequence[int]) -> Document:
    return prompt(" ".join(f"w{i}" for i in ids))
