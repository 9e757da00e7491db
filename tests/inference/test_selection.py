"""One of several candidates is chosen by a CLIP model, inside the engine."""

from dataclasses import replace

import pytest

from dreamllm.documents import End, Picture, Text, prompt
from dreamllm.inference import ClipJudge, DrawingOptions, Engine, GenerationOptions, best_candidate
from tests.evaluation.networks import write_clip
from tests.tiny import tiny_model

QUICK = DrawingOptions(steps=2, guidance_scale=2.0, scheduler="ddim", candidates=4)
LONE = GenerationOptions(max_new_tokens=0, pictures="force", drawing=QUICK)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(*tiny_model(tmp_path_factory.mktemp("tiny")))


CAPTIONS = ["a red dog", "the cat on the beach", "a dog on the red beach"]


def test_the_candidate_that_agrees_best_with_the_caption_is_kept(engine, clip):
    prompts = [prompt(caption) for caption in CAPTIONS]
    everything = engine.answers(prompts, LONE)
    chosen = engine.answers(prompts, replace(LONE, drawing=replace(QUICK, select=clip)))
    judge = ClipJudge(clip)
    best = [
        best_candidate(judge.agreement(answer.pictures, [caption]))
        for answer, caption in zip(everything, CAPTIONS, strict=True)
    ]
    assert any(best)  # not the first of all of them
    for answer, candidates, index in zip(chosen, everything, best, strict=True):
        (picture,) = answer.pictures
        assert picture.tobytes() == candidates.pictures[index].tobytes()


def test_of_a_chat_the_users_last_message_counts(engine, clip, monkeypatch):
    texts = []
    agreement = ClipJudge.agreement
    monkeypatch.setattr(ClipJudge, "agreement", lambda self, p, t: texts.append(t) or agreement(self, p, t))
    asked = engine.processor.chat([("user", "a cat"), ("assistant", "Yes."), ("user", "a red dog")])
    engine.answer(asked, replace(LONE, drawing=replace(QUICK, select=clip)))
    assert texts == [["a red dog"]]


def test_a_document_goes_on_with_the_chosen_picture(engine, clip, monkeypatch):
    """Two pictures in one answer, of four candidates each with noise of their own; the text before it judges each."""
    dream, eos = engine.layout.dream_start, engine.layout.eos
    tokens = iter([100, 101, dream, 102, dream, 103, eos])
    monkeypatch.setattr("dreamllm.inference.writing.most_likely", lambda *_: [next(tokens)])
    judged = []
    agreement = ClipJudge.agreement
    monkeypatch.setattr(ClipJudge, "agreement", lambda self, p, t: judged.append((p, t)) or agreement(self, p, t))
    options = GenerationOptions(max_new_tokens=10, drawing=replace(QUICK, select=clip))
    answer = engine.answer(prompt("a cat"), options)
    assert [type(part) for part in answer.document.parts] == [Text, Picture, Text, Picture, Text, End]
    decode = engine.processor.decode_text
    assert [texts for _, texts in judged] == [[decode([100, 101]).strip()], [decode([102]).strip()]]
    candidates = [picture.tobytes() for pictures, _ in judged for picture in pictures]
    assert len(set(candidates)) == 8
    for (pictures, texts), picture in zip(judged, answer.pictures, strict=True):
        assert picture is pictures[best_candidate(agreement(ClipJudge(clip), pictures, texts))]


def test_what_cannot_be_selected_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="select chooses among candidates; set candidates above 1"):
        DrawingOptions(select="clip")
    with pytest.raises(FileNotFoundError, match="is not a folder with a CLIP model"):
        engine.answer(prompt("a cat"), replace(LONE, drawing=replace(QUICK, select=str(tmp_path))))
    with pytest.raises(ValueError, match="candidates per picture, but writing goes on after one picture only"):
        engine.answer(prompt("a cat"), GenerationOptions(drawing=QUICK))
