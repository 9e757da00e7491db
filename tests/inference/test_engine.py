"""The text loop: agreement with transformers, pictures in the answer, independence, refusals."""

from dataclasses import replace

import pytest
import torch

from dreamllm.documents import Document, End, Picture, PictureError, Text, interleaved, prompt
from dreamllm.inference import DrawingOptions, Engine, GenerationOptions
from dreamllm.inference.sampling import choose_token, most_likely
from dreamllm.model import load_original
from tests.golden import reference
from tests.tiny import random_picture, tiny_model

QUICK = DrawingOptions(steps=2, guidance_scale=2.0, scheduler="ddim")
TEXT = GenerationOptions(max_new_tokens=12, pictures="forbid", drawing=QUICK)
FORCED = GenerationOptions(max_new_tokens=6, pictures="force", max_pictures=1, drawing=QUICK)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(*tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def eager(engine):
    """The engine with a head that likes `<dream_start>` and the end token enough to choose them now and then."""
    head = engine.model.get_output_embeddings().weight
    before = head.detach().clone()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for token in (engine.layout.dream_start, engine.layout.eos):
            head[token] = 1.2 * torch.randn(head.shape[1], generator=generator)
    yield engine
    with torch.no_grad():
        head.copy_(before)


def prompts():
    return [
        prompt("The license"),
        prompt("A copy of <image> and the work <image> shall", [random_picture(1), random_picture(2)]),
        prompt("<image>", [random_picture(3)]),
        prompt("You may modify the Program and distribute the copies of it under the terms of this license"),
    ]


def shown(answer):
    """An answer as comparable values."""
    return [part.text if isinstance(part, Text) else type(part).__name__ for part in answer.document.parts]


# -- agreement --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_transformers_generate_agrees_token_by_token(engine, index):
    document = prompts()[index]
    answer = engine.answer(document, TEXT)
    encoded = engine.processor.encode(document)
    batch = engine.processor.pad([encoded])
    del batch["labels"]
    ids = engine.model.generate(
        **batch,
        max_new_tokens=TEXT.max_new_tokens,
        do_sample=False,
        suppress_tokens=[*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start],
    )
    assert ids[0, len(encoded) :].tolist() == list(answer.token_ids)


def test_an_answer_continues_as_if_its_picture_had_been_in_the_prompt(engine):
    """The cache after a created picture equals a prefill of text, queries and the picture's features."""
    start = prompt("A photo")
    drawn = engine.answer(start, FORCED)
    picture = drawn.pictures[0]
    seen = Document((*start.parts, Picture(picture, comprehension=True, creation=True)))
    again = engine.answer(seen, replace(TEXT, max_new_tokens=FORCED.max_new_tokens))
    assert again.token_ids == drawn.token_ids


# -- independence --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}])
def test_answers_do_not_depend_on_the_batch(eager, sampling):
    options = GenerationOptions(max_new_tokens=20, max_pictures=2, drawing=QUICK, **sampling)
    seeds = [3, 1, 4, 1]
    alone = [eager.answers([p], options, [seed])[0] for p, seed in zip(prompts(), seeds, strict=True)]
    together = eager.answers(prompts(), options, seeds)
    backwards = eager.answers(prompts()[::-1], options, seeds[::-1])[::-1]
    small = Engine(eager.model, eager.processor, batch_size=3).answers(prompts(), options, seeds)
    for others in (together, backwards, small):
        for one, other in zip(alone, others, strict=True):
            assert one.token_ids == other.token_ids
            assert shown(one) == shown(other)
            for a, b in zip(one.pictures, other.pictures, strict=True):
                assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


def test_the_batch_test_covers_text_pictures_and_ends(eager):
    """So that the test above means something: some answers draw, some end, at different times."""
    options = GenerationOptions(max_new_tokens=20, max_pictures=2, drawing=QUICK, temperature=1.5)
    answers = eager.answers(prompts() * 3, options)
    assert any(answer.pictures for answer in answers)
    assert {answer.stopped for answer in answers} >= {"end", "length"}
    assert len({len(answer.token_ids) for answer in answers}) > 2


def test_conditions_do_not_depend_on_the_batch(engine):
    together = engine.conditions(prompts())
    for i, document in enumerate(prompts()):
        torch.testing.assert_close(together[i], engine.conditions([document])[0], rtol=1e-4, atol=1e-5)


def test_seeds_decide_sampling(engine):
    options = replace(TEXT, temperature=2.0)
    once, twice, other = (engine.answers([prompts()[0]], options, [seed])[0].token_ids for seed in (7, 7, 8))
    assert once == twice != other


def test_answering_leaves_the_training_mode_as_it_was(engine):
    engine.model.train()
    engine.answer(prompts()[0], TEXT)
    assert engine.model.training
    assert engine.model.unet.training
    engine.model.eval()


# -- pictures in the answer --------------------------------------------------------------------------------


def test_a_forced_picture_comes_first_and_writing_goes_on(engine):
    answer = engine.answer(prompts()[0], FORCED)
    assert shown(answer)[0] == "Picture"
    assert len(answer.token_ids) == 6
    assert answer.pictures[0].size == (8, 8)
    assert answer.pictures[0].mode == "L"


def test_a_lone_forced_picture_writes_nothing(engine):
    answer = engine.answer(prompts()[0], replace(FORCED, max_new_tokens=0))
    assert shown(answer) == ["Picture"]
    assert answer.token_ids == ()
    assert answer.stopped == "length"


def test_candidates_of_a_lone_picture(engine):
    drawing = replace(QUICK, candidates=3)
    answer = engine.answer(prompts()[0], GenerationOptions(max_new_tokens=0, pictures="force", drawing=drawing))
    assert len(answer.pictures) == 3
    assert len({picture.tobytes() for picture in answer.pictures}) == 3


def test_the_model_draws_where_it_chooses_the_dream_token(eager):
    options = GenerationOptions(max_new_tokens=20, drawing=QUICK, temperature=1.5, max_pictures=2)
    for answer in eager.answers(prompts() * 3, options):
        drawn = sum(token == eager.layout.dream_start for token in answer.token_ids)
        assert drawn == len(answer.pictures) <= 2


def test_forbidden_pictures_are_never_drawn(eager):
    options = GenerationOptions(max_new_tokens=20, pictures="forbid", drawing=QUICK, temperature=1.5)
    assert not any(answer.pictures for answer in eager.answers(prompts() * 3, options))


def test_pictures_stop_when_no_more_fit(engine, monkeypatch):
    """A model that always wants to draw fills the context with whole pictures, then writes text to the end."""
    dream = engine.layout.dream_start

    def wants_to_draw(logits, bias):
        return [100 if bias[dream].isinf() else dream] * len(logits)

    monkeypatch.setattr("dreamllm.inference.writing.most_likely", wants_to_draw)
    answer = engine.answer(prompts()[0], GenerationOptions(max_new_tokens=1000, drawing=QUICK))
    used = len(engine.processor.encode(prompts()[0]))
    per_picture = engine.layout.dream_length + engine.layout.image_length
    assert len(answer.pictures) == (engine.layout.max_length - used) // per_picture
    assert answer.stopped == "context"
    left = engine.layout.max_length - used - len(answer.pictures) * per_picture
    assert len(answer.token_ids) == len(answer.pictures) + left


def test_markers_are_never_written(engine):
    options = replace(TEXT, temperature=100.0, max_new_tokens=200)
    vocabulary = engine.processor.tokenizer.get_vocab()
    markers = {vocabulary[f"<{n}>"] for n in ("im_patch", "im_start", "im_end", "image", "dream", "dream_end")}
    markers.add(engine.layout.pad)
    for answer in engine.answers(prompts(), options):
        assert not markers & set(answer.token_ids)


def test_the_end_token_closes_the_document(engine, monkeypatch):
    tokens = iter([100, 101, engine.layout.eos])
    monkeypatch.setattr("dreamllm.inference.writing.most_likely", lambda *_: [next(tokens)])
    answer = engine.answer(prompts()[0], TEXT)
    assert answer.stopped == "end"
    assert answer.document.parts[-1] == End()
    assert answer.token_ids == (100, 101, engine.layout.eos)
    assert answer.text == engine.processor.decode_text([100, 101])


def test_a_prompt_may_hold_created_pictures(engine):
    """The queries stand in the prompt as in training; the answer differs from one where the picture is only read."""
    joint = interleaved(["One", "Two"], [(0, random_picture(5))], "joint")
    read = interleaved(["One", "Two"], [(0, random_picture(5))], "comprehension")
    joint, read = (Document(document.parts[:-1]) for document in (joint, read))
    assert engine.answer(joint, TEXT).token_ids != engine.answer(read, TEXT).token_ids


def test_no_prompts_no_answers(engine):
    assert engine.answers([]) == []


# -- sampling --------------------------------------------------------------------------------


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([1.0, 2.0, 0.0, 3.0, 5.0])
    forbidden = torch.tensor([False, False, False, False, True])
    generator = torch.Generator().manual_seed(0)
    draws = [choose_token(logits, forbidden, temperature=2.0, generator=generator) for _ in range(4000)]
    expected = torch.softmax(logits[:4] / 2.0, 0)
    found = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    assert len(found) == 4
    assert (found - expected).abs().max() < 0.03


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    allowed = torch.zeros(4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def seen(**cut):
        return {choose_token(logits, allowed, 1.0, generator=generator, **cut) for _ in range(300)}

    assert seen(top_k=2) == {2, 3}
    assert seen(top_k=1) == {3}
    assert seen(top_p=0.4) == {3}
    assert seen(top_p=0.5) == {2, 3}
    assert seen(top_p=0.95) == {0, 1, 2, 3}
    assert seen(top_k=3, top_p=0.75) == {2, 3}


def test_a_very_low_temperature_is_greedy():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(18))
    nothing = torch.zeros(100, dtype=torch.bool)
    for tiny in (1e-30, 1e-300, 5e-324):
        assert choose_token(logits, nothing, tiny, generator=torch.Generator()) == int(logits.argmax())
        assert choose_token(logits, nothing, 1.0, top_p=tiny, generator=torch.Generator()) == int(logits.argmax())


def test_the_most_likely_tokens_of_many_rows_are_those_of_each():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(19)).bfloat16()
    logits[2] = 1.0  # the first of equals
    forbidden = torch.rand(300, generator=torch.Generator().manual_seed(20)) < 0.5
    bias = torch.zeros(300).masked_fill_(forbidden, float("-inf"))
    assert most_likely(logits, bias) == [choose_token(row, forbidden) for row in logits]


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [Document(()), Document((Text(""),)), Document((Text("  "), End()))])
def test_an_empty_prompt_is_refused(engine, empty):
    with pytest.raises(ValueError, match="is empty; give it text or a picture"):
        engine.answer(empty)


def test_an_over_long_prompt_says_by_how_much(engine):
    text = "license " * 300
    excess = 1 + len(engine.processor.encode_text(text)) - engine.layout.max_length
    with pytest.raises(ValueError, match=f"{excess} more than the context of {engine.layout.max_length}"):
        engine.answer(prompt(text))


def test_more_pictures_than_fit_are_refused(engine):
    count = engine.layout.max_length // engine.layout.image_length + 1
    with pytest.raises(ValueError, match="more than the context of 256; shorten the text or use fewer pictures"):
        engine.answer(prompt("<image>" * count, [random_picture(0)] * count))


def full_prompt(engine, length):
    """A prompt of exactly `length` tokens."""
    parts = [Text("license")]
    while len(engine.processor.encode(Document((*parts, Text("license")), "cut"))) < length:
        parts.append(Text("license"))
    rest = length - len(engine.processor.encode(Document(tuple(parts), "error")))
    return Document((*parts, *[End()] * rest), name="the prompt")


def test_a_prompt_that_leaves_no_room_is_refused(engine):
    most = engine.layout.max_length
    with pytest.raises(ValueError, match=f"of {most} tokens leaves no room for an answer: shorten it by 1 "):
        engine.answer(full_prompt(engine, most))
    answer = engine.answer(full_prompt(engine, most - 1), TEXT)
    assert len(answer.token_ids) == 1


def test_a_forced_picture_that_does_not_fit_is_refused(engine):
    most = engine.layout.max_length - engine.layout.dream_length
    lone = replace(FORCED, max_new_tokens=0)
    assert len(engine.answer(full_prompt(engine, most), lone).pictures) == 1
    with pytest.raises(ValueError, match="leaves no room for a picture: shorten it by 1 "):
        engine.answer(full_prompt(engine, most + 1), lone)
    with pytest.raises(ValueError, match="leaves no room for a picture"):
        engine.answer(full_prompt(engine, most), FORCED)


def test_a_picture_that_is_not_one_is_named(engine, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(PictureError, match=r"notes\.png is not an image file"):
        engine.answer(prompt("<image>", [path]))
    with pytest.raises(PictureError, match=r"missing\.png does not exist"):
        engine.answer(prompt("<image>", [tmp_path / "missing.png"]))


def test_a_wrong_number_of_seeds_is_refused(engine):
    with pytest.raises(ValueError, match="2 seeds were given, but 4 are needed, one per prompt"):
        engine.answers(prompts(), TEXT, [1, 2])


def test_candidates_need_a_lone_forced_picture(engine):
    with pytest.raises(ValueError, match="2 candidates per picture, but writing goes on after one picture only"):
        engine.answer(prompts()[0], replace(TEXT, drawing=replace(QUICK, candidates=2)))


def test_a_processor_of_another_model_is_refused(engine):
    _, other = load_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION)
    with pytest.raises(ValueError, match="do not belong together"):
        Engine(engine.model, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pictures": "maybe"}, "pictures must be 'allow', 'forbid' or 'force'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_pictures": 0, "pictures": "force"}, "max_pictures must be at least 0"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be at least 0"),
        ({"top_k": 5}, "top_p and top_k need a temperature above 0"),
    ],
)
def test_generation_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**wrong)
