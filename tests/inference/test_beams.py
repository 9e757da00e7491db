"""Beam search gives transformers' answers: the same tokens and the same scores."""

import pytest
import torch

from dreamllm.documents import Document, prompt
from dreamllm.inference import Engine, GenerationOptions
from dreamllm.inference.beams import BeamSearch
from tests.tiny import random_picture, tiny_model

OPTIONS = [
    {"num_beams": 5},
    {"num_beams": 2, "max_new_tokens": 3},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.5},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 5, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never"},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 5, "min_new_tokens": 6},
    {"num_beams": 3, "repetition_penalty": 1.7},
    {"num_beams": 5, "max_new_tokens": 1},
]


@pytest.fixture(scope="module", params=range(3), ids=lambda seed: f"model {seed}")
def engine(request, tmp_path_factory):
    """A random model whose end token is likely enough that beams end at different lengths."""
    seed = request.param
    model, processor = tiny_model(tmp_path_factory.mktemp("tiny"), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[model.layout.eos] = (0.6 + 0.3 * seed) * torch.randn(head.shape[1], generator=generator)
    return Engine(model, processor)


def prompts():
    return [
        prompt("The license"),
        prompt("A copy of <image> and the work <image> shall", [random_picture(1), random_picture(2)]),
        prompt("<image>", [random_picture(3)]),
        prompt("You may modify the Program and distribute the copies of it under the terms of this license"),
    ]


def searched(engine, documents, **options):
    answers = engine.answers(documents, GenerationOptions(**{"max_new_tokens": 10, "pictures": "forbid"} | options))
    return [(list(answer.token_ids), answer.score) for answer in answers]


def generated(engine, documents, **options):
    """The same by transformers, on one left-padded batch."""
    batch = engine.processor.pad([engine.processor.encode(document) for document in documents], padding_side="left")
    longest, pad = batch["input_ids"].shape[1], engine.layout.pad
    found = engine.model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch.get("pixel_values"),
        **{"max_new_tokens": 10} | options,
        do_sample=False,
        suppress_tokens=[*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start],
        eos_token_id=engine.layout.eos,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[longest:].tolist() for row in found.sequences]
    rows = [[token for token in row if token != pad] for row in rows]
    return list(zip(rows, found.sequences_scores.tolist(), strict=True))


def assert_same(mine, theirs):
    for (tokens, score), (expected_tokens, expected_score) in zip(mine, theirs, strict=True):
        assert tokens == expected_tokens
        assert score == pytest.approx(expected_score, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beams_are_those_of_transformers(engine, options):
    mine = searched(engine, prompts(), **options)
    for document, found in zip(prompts(), mine, strict=True):
        assert_same([found], generated(engine, [document], **options))


@pytest.mark.parametrize("options", [{"num_beams": 5}, {"num_beams": 3, "early_stopping": True}], ids=str)
def test_a_batch_of_prompts_of_different_lengths(engine, options):
    documents = [prompts()[0], prompts()[3], prompt("and")]
    assert_same(searched(engine, documents, **options), generated(engine, documents, **options))


def test_the_models_of_these_tests_end_some_beams_early(engine):
    lengths = {len(tokens) for o in OPTIONS[:6] for tokens, _ in searched(engine, prompts(), **o)}
    assert len(lengths) > 2


def test_beams_find_what_is_likelier_than_the_greedy_answer(engine):
    """Of answers that are all cut off at one length, so that only their probabilities count."""
    options = {"min_new_tokens": 6, "max_new_tokens": 6}

    def log_probability(document, tokens):
        encoded = engine.processor.encode(document)
        batch = engine.processor.pad([encoded])
        del batch["labels"]
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens])], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            logits = engine.model(**batch).logits[0, len(encoded) - 1 : -1]
        return logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item()

    better = 0
    for document in prompts():
        (beams, score), (greedy, _) = (searched(engine, [document], num_beams=n, **options)[0] for n in (8, 1))
        assert score * 6 == pytest.approx(log_probability(document, beams), rel=1e-3)
        better += log_probability(document, beams) > log_probability(document, greedy) + 1e-4
    assert better


def test_pages_of_dead_beams_are_free(engine):
    searched(engine, prompts(), num_beams=5)
    assert engine._cache.pages_in_use == 0


def test_a_search_over_a_known_tree():
    """The likeliest first token leads nowhere: two beams find 'b c', one does not."""
    probabilities = {(): [0.5, 0.4, 0.05, 0.05], (0,): [0.3, 0.3, 0.2, 0.2], (1,): [0.01, 0.01, 0.97, 0.01]}

    def run(num_beams):
        search = BeamSearch(num_beams, eos=3, max_new_tokens=2, length_penalty=0.0)
        while not search.done:
            rows = [probabilities.get(beam, [0.25] * 4) for beam in search.beams]
            search.advance(torch.tensor(rows).log())
        return search.best

    assert run(2).tokens == (1, 2)
    assert run(2).score == pytest.approx(torch.tensor(0.4 * 0.97).log().item())
    assert run(1).tokens[0] == 0


def test_the_context_ends_a_search(engine):
    text = Document(prompt("license " * 200).parts)
    room = engine.layout.max_length - len(engine.processor.encode(text))
    answer = engine.answer(text, GenerationOptions(num_beams=3, pictures="forbid", min_new_tokens=room))
    assert len(answer.token_ids) == room
    assert answer.stopped == "context"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "temperature": 1.0}, "beams take no chances"),
        ({"num_beams": 2, "pictures": "allow"}, "beams write text only"),
        ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping must be True, False or 'never'"),
        ({"num_beams": 2, "length_penalty": float("inf")}, "length_penalty must be finite"),
        ({"length_penalty": 2.0}, "decide among beams; set num_beams above 1"),
        ({"min_new_tokens": 513}, r"min_new_tokens must be from 0 to max_new_tokens \(512\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**{"pictures": "forbid"} | wrong)
