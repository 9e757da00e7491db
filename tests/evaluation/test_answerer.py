"""The model behind the benchmarks: batches change nothing, answers are transformers', processes share the work."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

from dreamllm.documents import SPECIAL_TOKENS, Document, Picture, Text
from dreamllm.evaluation import run as run_module
from dreamllm.evaluation.answerer import ModelAnswerer
from dreamllm.evaluation.benchmarks import Decoding, Drawing, find_benchmark
from dreamllm.evaluation.run import RunOptions, run_benchmark
from dreamllm.inference import Assistant, Engine
from tests.evaluation.folders import WRITERS
from tests.tiny import random_picture, tiny_model

WORDS = ("license", "copy", "of the work", "a", "you may", "notice and terms")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def answerer(tiny, batch_size):
    return ModelAnswerer(Assistant(Engine(*tiny)), batch_size)


def prompts(texts=WORDS):
    return [
        Document(
            (Text("USER: "), Picture(random_picture(i), comprehension=True), Text(f"{text} ASSISTANT:")), "error", text
        )
        for i, text in enumerate(texts)
    ]


GREEDY, BEAMS, LONG_BEAMS = Decoding(1, 8), Decoding(5, 8), Decoding(3, 8, 0.0, 2.0)


@pytest.mark.parametrize("decoding", [GREEDY, Decoding(1, 8, 0.7), BEAMS, LONG_BEAMS], ids=str)
def test_a_batch_answers_as_one_by_one(tiny, decoding):
    asked = prompts()
    seeds = range(len(asked))
    together = answerer(tiny, 4).answers(asked, decoding, seeds)
    alone = [answerer(tiny, 1).answers([p], decoding, [s])[0] for p, s in zip(asked, seeds, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, LONG_BEAMS], ids=str)
def test_answers_are_those_of_generate(tiny, decoding):
    asked = prompts()
    assert answerer(tiny, 4).answers(asked, decoding, range(len(asked))) == [
        generated(tiny, p, decoding) for p in asked
    ]


def generated(tiny, document, decoding):
    """One prompt by transformers, as the original evaluates; the markers, which are no words, are never written."""
    model, processor = tiny
    batch = processor.pad([processor.encode(document)])
    del batch["labels"]
    vocabulary = processor.tokenizer.get_vocab()
    markers = {vocabulary[token] for token in SPECIAL_TOKENS if token in vocabulary} | {processor.layout.pad}
    only_beams = {"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}
    written = model.generate(
        **batch,
        num_beams=decoding.beams,
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        suppress_tokens=sorted(markers),
        eos_token_id=processor.layout.eos,
        pad_token_id=processor.layout.pad,
        **only_beams,
    )
    return processor.decode_text(written[0, batch["input_ids"].shape[1] :].tolist())


def test_beams_find_more_likely_answers_than_greed(tiny):
    """By the score of beam search: the mean log-probability of the tokens."""
    model, processor = tiny

    def likelihood(prompt, text):
        ids = processor.encode(prompt)
        answer = processor.encode_text(text)
        batch = processor.pad([ids])
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([answer])], 1)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits[0].log_softmax(-1)
        steps = range(len(ids) - 1, len(ids) + len(answer) - 1)
        return sum(float(logits[i, token]) for i, token in zip(steps, answer, strict=True)) / max(1, len(answer))

    asked = prompts()
    greedy, beams = (answerer(tiny, 8).answers(asked, Decoding(n, 4), [0] * len(asked)) for n in (1, 6))
    gains = [likelihood(p, b) - likelihood(p, g) for p, g, b in zip(asked, greedy, beams, strict=True)]
    assert sum(gains) > 0


def test_beams_take_any_number_of_pictures_and_write_no_markers(tiny):
    two = Document((Picture(random_picture(0), comprehension=True), Picture(random_picture(1), comprehension=True)))
    asked = [*prompts(), two, Document((Text("a"),))]
    texts = answerer(tiny, 8).answers(asked, Decoding(2, 30), range(len(asked)))
    assert not any(marker in text for text in texts for marker in SPECIAL_TOKENS)
    assert texts[-2:] == [generated(tiny, document, Decoding(2, 30)) for document in asked[-2:]]


def test_prompts_without_room_and_decodings_that_contradict_themselves_are_refused(tiny):
    with pytest.raises(ValueError, match="tokens"):
        answerer(tiny, 8).answers(prompts(["license " * 250]), Decoding(2, 3), [0])
    with pytest.raises(ValueError, match="length_penalty and early_stopping decide among beams"):
        answerer(tiny, 8).answers(prompts(), Decoding(1, 3, length_penalty=2.0), range(len(WORDS)))


def test_candidates_are_drawn_together_as_one_by_one(tiny):
    drawing = Drawing(2, 2.0, "ddim", 3)
    captions = [Document((Text(word),)) for word in WORDS[:3]]
    together = answerer(tiny, 4).pictures(captions, drawing, [5, 6, 7])
    alone = [answerer(tiny, 1).pictures([c], drawing, [s])[0] for c, s in zip(captions, (5, 6, 7), strict=True)]
    assert [len(candidates) for candidates in together] == [3, 3, 3]
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1
    assert len({picture.tobytes() for candidates in together for picture in candidates}) == 9


def test_processes_give_the_records_of_one(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    WRITERS["textvqa"](tmp_path / "data")
    options = RunOptions(tmp_path / "model", tmp_path / "data", tmp_path / "one", "plain", batch_size=2)
    results = run_benchmark(find_benchmark("textvqa"), options)
    both = replace(options, out=tmp_path / "two")
    assert run_benchmark(find_benchmark("textvqa"), both, processes=2) == results
    assert (tmp_path / "two" / "records.jsonl").read_bytes() == (tmp_path / "one" / "records.jsonl").read_bytes()
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == results


def test_a_model_killed_at_any_moment_goes_on_to_the_same_bytes(tiny, tmp_path):
    """Beams, so that the company in which an answer is computed could show."""
    (tmp_path / "data").mkdir()
    WRITERS["textvqa"](tmp_path / "data")
    path = tmp_path / "data" / "TextVQA_0.5.1_val.json"
    values = json.loads(path.read_text())
    rows = [row | {"question_id": 100 * k + i} for k in range(6) for i, row in enumerate(values["data"])]
    path.write_text(json.dumps(values | {"data": rows}))
    model = answerer(tiny, 4)
    options = RunOptions(tmp_path, tmp_path / "data", tmp_path / "whole", "original", batch_size=4)
    benchmark = find_benchmark("textvqa")
    decoding = replace(benchmark.prompting["original"], decoding=Decoding(3, 6), system="", request="")
    benchmark = replace(benchmark, prompting={"original": decoding})
    run_benchmark(benchmark, options, answerer=lambda _: model)
    killed = replace(options, out=tmp_path / "killed")
    rng = random.Random(0)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                run_benchmark(benchmark, killed, answerer=lambda _: model)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run_benchmark(benchmark, killed, answerer=lambda _: model)
    for name in ("answers-00000-of-00001.jsonl", "records.jsonl", "results.json"):
        assert (killed.out / name).read_bytes() == (options.out / name).read_bytes()


def fail(*_):
    raise SystemExit(2)


def test_a_failing_process_is_reported(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    WRITERS["textvqa"](tmp_path / "data")
    monkeypatch.setattr(run_module, "get_context", lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(run_module, "_process", fail)
    options = RunOptions(tmp_path, tmp_path / "data", tmp_path / "out", "plain")
    with pytest.raises(ValueError, match=r"process 0 of 2 failed .*the same command goes on from there"):
        run_benchmark(find_benchmark("textvqa"), options, processes=2)
