"""Sizes equal the paper's, documents have the lengths of its data, and every stage trains on them."""

from __future__ import annotations

import contextlib
import statistics

import pytest
import torch

from dreamllm.data import Mixture, derive_seed, prepare
from dreamllm.model import DreamLLMProcessor
from dreamllm.training import stage_batches
from dreamllm.training.step import make_optimizer, prepare_model, train_step
from dreamllm.workloads import (
    DOCUMENT_KINDS,
    PROMPT_KINDS,
    SIZES,
    STAGES,
    SyntheticDocuments,
    make_model,
    make_processor,
    model_config,
    stage,
    stage_config,
)


def test_7b_has_the_papers_parameters():
    with torch.device("meta"):
        groups = make_model("7b").parameter_groups()
    count = {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    hidden, intermediate, vocabulary = 4096, 11008, 32008
    assert count["language_model"] == 32 * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden) + hidden
    assert count["embeddings"] == count["lm_head"] == vocabulary * hidden
    assert count["visual_projector"] == 4_198_400
    assert count["dream_queries"] == 262_144
    assert count["condition_projector"] == 4_194_304
    # The specification's rounded figures: 303 M, 866 M and 84 M.
    assert [round(count[name] / 1e6) for name in ("vision_model", "unet", "vae")] == [303, 866, 84]


def test_7b_has_the_papers_sequences():
    config = model_config("7b")
    assert config.vocab_size == 32008
    assert (config.tokens_per_image, config.num_dream_queries, config.picture_size) == (256, 64, 512)
    assert config.layout().max_length == 2048


@pytest.mark.parametrize("size", SIZES)
def test_words_are_single_tokens(size):
    processor = make_processor(size)
    assert processor.encode_text("w3 w17 w87") == [3, 17, 87]
    assert len(processor.tokenizer) == processor.settings.vocab_size


def lengths(kind: str, size: str = "7b", count: int = 150) -> list[int]:
    processor, reader = make_processor(size), SyntheticDocuments(kind, size, count)
    return [len(processor.encode(reader[i])) for i in range(count)]


def test_documents_have_the_lengths_of_real_data():
    assert 300 <= statistics.mean(lengths("comprehension pair")) <= 330
    assert 105 <= statistics.mean(lengths("creation pair")) <= 125
    documents = lengths("interleaved")
    assert 1200 <= statistics.mean(documents) <= 1600
    assert max(documents) > 1900
    assert min(documents) < 800


@pytest.mark.parametrize("kind", [*DOCUMENT_KINDS, *PROMPT_KINDS])
def test_a_document_follows_from_its_seed(kind):
    a, b, other = (SyntheticDocuments(kind, "tiny", 50, seed) for seed in (1, 1, 2))
    assert [a[i] for i in (0, 31)] == [b[i] for i in (0, 31)]
    assert a[5] != a[6]
    assert a[5] != other[5]


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_documents_are_usable_and_their_pictures_can_be_read(kind, size):
    processor, reader = make_processor(size), SyntheticDocuments(kind, size, 12)
    for i in range(len(reader)):
        sample = prepare(reader[i], processor)
        assert {problem.reason for problem in sample.problems} <= {"trimmed"}
        assert len(sample.encoded) <= processor.layout.max_length


def test_prompts_have_the_lengths_of_the_papers():
    asked = lengths("picture prompt")
    assert set(asked) == {1 + 256 + 2 + 20}
    drawn = lengths("drawing prompt")
    assert 1 + 10 == min(drawn) < max(drawn) == 1 + 40


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_trains_on_its_documents(name):
    processor, model = make_processor("tiny"), make_model("tiny")
    config = stage_config(name, "tiny", documents_per_step=6)
    batch = stage_batches(config, processor)[0].batch.to("cpu")
    optimizer = make_optimizer(prepare_model(model, config), config)
    losses = train_step(model, optimizer, [batch], config, torch.Generator().manual_seed(0), contextlib.nullcontext())
    assert losses.isfinite().all()
    assert losses[2] > 0


def test_stage_two_is_half_documents_and_half_pairs():
    config = stage_config("stage2", "tiny")
    mixture = Mixture(config.data, derive_seed(0, "x"))
    drawn = [mixture.draw(i).reader.name for i in range(200)]
    assert 70 <= drawn.count("synthetic interleaved") <= 130


def test_random_weights_follow_from_the_seed():
    a, b, c = (make_model("tiny", seed) for seed in (1, 1, 2))
    assert torch.equal(a.dream_queries, b.dream_queries)
    assert not torch.equal(a.dream_queries, c.dream_queries)


def test_the_processor_survives_saving(tmp_path):
    processor = make_processor("tiny")
    processor.save_pretrained(tmp_path)
    again = DreamLLMProcessor.from_pretrained(tmp_path)
    document = SyntheticDocuments("interleaved", "tiny", 1)[0]
    assert again.encode(document).input_ids == processor.encode(document).input_ids


def test_stages_are_known_by_number():
    assert stage("2") is STAGES["stage2"]
    assert stage("2").total_documents == 4_000_000
    assert stage("3").total_documents == 360_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage("4"), r"unknown stage '4'.*\n  stage1: alignment"),
        (lambda: stage("stage_2"), "Did you mean 'stage2'"),
        (lambda: make_processor("minni"), "unknown size 'minni'. Did you mean 'mini'"),
        (lambda: SyntheticDocuments("poem", "tiny", 3), "unknown kind of document 'poem'; known: comprehension pair"),
    ],
)
def test_unknown_names_list_the_known_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_outside_the_collection():
    with pytest.raises(IndexError):
        SyntheticDocuments("pair", "tiny", 3).document(3)
