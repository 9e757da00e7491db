"""The original's pattern computes what DreamLLM computes, in the original's wasteful way, without dreamkernels."""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models.workloads import stage_documents
from benchmarks.original_pattern import OriginalPattern, Trainer, pad_batch, write
from benchmarks.original_pattern.drawing import draw_pixels
from benchmarks.original_pattern.training import language_loss, losses
from dreamllm.inference import DrawingOptions, Engine, GenerationOptions, draw
from dreamllm.model.original import load_original
from dreamllm.training import StageConfig
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import SyntheticDocuments, make_model, make_processor
from tests.golden import reference

SIZE = "tiny"
GRADIENT_TOLERANCE = 1e-4
"""Of the norm. Both programs sum thousands of float32 products (relative rounding 6e-8) in different orders through a
few dozen layers; 1e-4 is a tenth of what the numbers recorded from the original support."""


def stage(kind):
    return StageConfig(kind, kind, (), steps=10, documents_per_step=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def processor():
    return make_processor(SIZE)


def picture_prompt():
    return SyntheticDocuments("picture prompt", SIZE, 1)[0]


def generator():
    return torch.Generator().manual_seed(7)


KINDS = ["stage1_comprehension", "stage1_creation", "stage2", "stage3"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_dreamllm(kind, processor):
    encoded = [processor.encode(document) for document in stage_documents(kind, SIZE, 6)]
    assert len({len(document) for document in encoded}) > 1
    model = make_model(SIZE).eval()
    theirs = OriginalPattern(model)
    prepare_model(model, stage(kind))
    Trainer(theirs, stage(kind))

    output = model.forward_packed(processor.pack(encoded), generator())
    output.loss.backward()
    lm_loss, vm_loss = losses(theirs, pad_batch(encoded, processor.layout, processor), generator())
    w_lm, w_vm = stage(kind).weights
    (w_lm * lm_loss + (0.0 if vm_loss is None else w_vm * vm_loss)).backward()

    assert (output.lm_loss is None) == (w_lm == 0)
    if output.lm_loss is not None:
        torch.testing.assert_close(output.lm_loss, lm_loss, rtol=1e-4, atol=0)
    assert (output.vm_loss is None) == (vm_loss is None)
    if vm_loss is not None:
        torch.testing.assert_close(output.vm_loss, vm_loss, rtol=1e-4, atol=0)
    groups = theirs.parameter_groups()
    compared = 0
    for name, ours in model.parameter_groups().items():
        for mine, other in zip(ours, groups[name], strict=True):
            assert mine.requires_grad == other.requires_grad
            if mine.requires_grad:
                expected = other.grad.reshape(mine.shape)
                assert (mine.grad - expected).norm() <= GRADIENT_TOLERANCE * expected.norm(), name
                compared += bool(expected.norm() > 0)
    assert compared >= len(stage(kind).groups)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ten_steps_of_a_stage_are_those_of_dreamllm(kind, processor):
    """Each on documents and noise of its own; the last losses come from weights that nine updates made."""
    encoded = [processor.encode(document) for document in stage_documents(kind, SIZE, 40)]
    model = make_model(SIZE).eval()
    theirs = OriginalPattern(model)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(prepare_model(model, stage(kind)), stage(kind))
    trainer = Trainer(theirs, stage(kind))
    for step in range(10):
        documents = encoded[4 * step : 4 * (step + 1)]
        packed, padded = processor.pack(documents), pad_batch(documents, processor.layout, processor)
        seeds = [torch.Generator().manual_seed(step) for _ in range(2)]
        mine = train_step(model, optimizer, [packed], stage(kind), seeds[0], contextlib.nullcontext())
        torch.testing.assert_close(mine, torch.tensor(trainer.step(padded, seeds[1])), rtol=1e-4, atol=0)
    moved = {id(p): p.detach() - s for p, s in zip(model.parameters(), start, strict=True)}
    groups = theirs.parameter_groups()
    for name, ours in model.parameter_groups().items():
        for mine, other in zip(ours, groups[name], strict=True):
            difference = (mine.detach() - other.detach().reshape(mine.shape)).norm()
            # AdamW divides by the gradient's own size, so the smallest gradients decide: a percent, not 1e-4.
            assert difference <= 1e-2 * moved[id(mine)].norm() + 1e-7, name


@pytest.fixture(scope="module")
def written(processor):
    """A model, its pattern and the inputs of one captioning prompt."""
    model = make_model(SIZE).eval()
    encoded = processor.encode(picture_prompt())
    batch = processor.pad([encoded])
    return model, OriginalPattern(model), batch


def never(engine):
    return [*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start]


def test_greedy_tokens_are_those_of_the_engine(written, processor):
    model, theirs, batch = written
    engine = Engine(model, processor)
    options = GenerationOptions(max_new_tokens=16, pictures="forbid")
    answer = engine.answer(picture_prompt(), options)
    assert answer.stopped == "length"
    inputs = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    assert write(theirs, *inputs, 16, never=never(engine))[0].tolist() == list(answer.token_ids)
    assert len(set(answer.token_ids)) > 4


def test_five_beams_are_those_of_generate(written, processor):
    model, theirs, batch = written
    forbidden = never(Engine(model, processor))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    ids = model.generate(
        **inputs, max_new_tokens=16, min_new_tokens=16, num_beams=5, do_sample=False, suppress_tokens=forbidden
    )
    inputs = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    beams = write(theirs, *inputs, 16, num_beams=5, never=forbidden)
    assert beams.tolist() == ids[:, batch["input_ids"].shape[1] :].tolist()
    assert beams.tolist() != write(theirs, *inputs, 16, never=forbidden).tolist()


def test_pictures_are_those_of_the_sampler(processor):
    model = make_model(SIZE).eval()
    reader = SyntheticDocuments("drawing prompt", SIZE, 3)
    prompts = [reader[i] for i in range(3)]
    encoded = [processor.encode(prompt).input_ids for prompt in prompts]
    assert len({len(ids) for ids in encoded}) > 1
    engine = Engine(model, processor)
    options = DrawingOptions(steps=5, guidance_scale=2.0)
    seeds = [3, 4, 5]
    mine = draw(model, engine.conditions(prompts), engine.null_condition(), options, seeds)
    theirs = draw_pixels(OriginalPattern(model), encoded, seeds, options.steps, options.guidance_scale)
    assert ((mine > 0) & (mine < 1)).float().mean() > 0.5
    assert (mine - theirs).abs().max() < 1e-4


def test_the_recorded_logits_and_language_loss_of_the_original():
    """The pattern against numbers of the original program itself."""
    model, _ = load_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION, "original")
    theirs = OriginalPattern(model)
    outputs = theirs(
        reference.array("input_ids"),
        reference.array("attention_mask"),
        images=reference.array("images"),
        with_queries=True,
        use_cache=False,
    )
    real = reference.array("attention_mask").bool()
    expected = reference.array("logits")[real]
    assert (outputs.logits[real] - expected).abs().max() <= 1e-4 * expected.abs().max()
    lm_loss = language_loss(outputs.logits, reference.array("labels"))
    torch.testing.assert_close(lm_loss, reference.array("lm_loss"), rtol=1e-4, atol=0)


# -- its ways ----------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts operators by namespace."""

    def __init__(self):
        super().__init__()
        self.namespaces = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces[func.namespace] += 1
        return func(*args, **(kwargs or {}))


def test_no_operator_of_dreamkernels_runs(processor):
    encoded = [processor.encode(document) for document in stage_documents("stage2", SIZE, 4)]
    model = make_model(SIZE).eval()
    theirs = OriginalPattern(model)
    with Operators() as seen:
        losses(theirs, pad_batch(encoded, processor.layout, processor), generator())
        draw_pixels(theirs, [encoded[0].input_ids[:5]], [0], 2, 2.0)
    assert set(seen.namespaces) <= {"aten", "prim", "prims"}
    with Operators() as seen:
        model.forward_packed(processor.pack(encoded), generator())
    assert seen.namespaces["dreamkernels"] > 0


@contextlib.contextmanager
def counted(module):
    """Counts the calls of `module`."""
    calls = []
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(module))
    yield calls
    handle.remove()


def test_clip_runs_in_every_decoding_step(written):
    _, theirs, batch = written
    with counted(theirs.clip) as calls:
        write(theirs, batch["input_ids"], batch["attention_mask"], batch["pixel_values"], 6)
    assert len(calls) == 6


def test_the_condition_is_projected_in_every_denoising_step(written):
    _, theirs, _ = written
    keys = next(module for name, module in theirs.unet.named_modules() if name.endswith("attn2.to_k"))
    with counted(keys) as key_calls, counted(theirs.clip) as clip_calls:
        draw_pixels(theirs, [[1, 20, 21]], [0], 4, 2.0)
    assert len(key_calls) == 4
    assert len(clip_calls) == 4  # text and queries, of the prompt and of the empty prompt


def test_decoder_layers_are_checkpointed_and_the_unet_is_not(processor):
    encoded = [processor.encode(document) for document in stage_documents("stage2", SIZE, 4)]
    theirs = OriginalPattern(make_model(SIZE).eval())
    trainer = Trainer(theirs, stage("stage2"))
    block = theirs.unet.mid_block.resnets[0]
    with counted(theirs.model.layers[0].mlp) as layers, counted(block) as blocks:
        trainer.step(pad_batch(encoded, processor.layout, processor), generator())
    assert len(layers) == 2  # forward, and again in the backward pass
    assert len(blocks) == 1
