"""Requests that join and leave between steps: independence, control, events, limits and failures."""

from dataclasses import replace

import pytest
import torch

from dreamkernels import GraphedCalls, UnsupportedScheduler
from dreamllm.documents import Document, End, PictureError, Text, prompt
from dreamllm.inference import (
    DrawingOptions,
    Engine,
    GenerationOptions,
    NewPicture,
    NewText,
    Preview,
    denoising,
    picture_work,
)
from dreamllm.inference.request import Request
from tests.support.graphs import rerunning
from tests.tiny import random_picture, tiny_model

QUICK = DrawingOptions(steps=3, guidance_scale=2.0, scheduler="ddim")
OTHER = DrawingOptions(steps=2, guidance_scale=1.0, scheduler="ddpm")
TEXT = GenerationOptions(max_new_tokens=12, pictures="forbid", drawing=QUICK)
LONE = GenerationOptions(max_new_tokens=0, pictures="force", drawing=QUICK)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that likes `<dream_start>` and the end token enough to choose them now and then."""
    model, processor = tiny_model(tmp_path_factory.mktemp("tiny"))
    head = model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for token in (model.layout.dream_start, model.layout.eos):
            head[token] = 1.2 * torch.randn(head.shape[1], generator=generator)
    return model, processor


@pytest.fixture
def engine(tiny):
    return Engine(*tiny)


def work():
    """Requests of every kind, with their seeds."""
    several = replace(QUICK, candidates=3)
    mixed = GenerationOptions(max_new_tokens=20, max_pictures=2, drawing=QUICK, temperature=1.5)
    return [
        (prompt("The license"), TEXT, 0),
        (prompt("A copy of <image> and the work <image> shall", [random_picture(1), random_picture(2)]), mixed, 1),
        (prompt("<image>", [random_picture(3)]), replace(TEXT, num_beams=4, length_penalty=0.5), 2),
        (prompt("A photo"), replace(LONE, drawing=several), 3),
        (prompt("You may modify the Program"), replace(mixed, drawing=OTHER, pictures="force"), 4),
        (prompt("Another photo of it"), LONE, 5),
        (prompt("and"), replace(mixed, top_p=0.9, repetition_penalty=1.3), 6),
        (prompt("or <image>", [random_picture(4)]), replace(TEXT, num_beams=2, min_new_tokens=9), 7),
        (prompt("distribute the copies of it"), mixed, 8),
    ]


def assert_same(one, other):
    assert one.token_ids == other.token_ids
    assert one.stopped == other.stopped
    assert [type(part) for part in one.document.parts] == [type(part) for part in other.document.parts]
    assert one.text == other.text
    for a, b in zip(one.pictures, other.pictures, strict=True):
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


@pytest.fixture(scope="module")
def alone(tiny):
    """Each answer of an engine that had nothing else to do."""
    return [Engine(*tiny).answers([document], options, [seed])[0] for document, options, seed in work()]


def run(engine):
    steps = 0
    while engine.step():
        steps += 1
        assert steps < 1000
    return steps


# -- independence ------------------------------------------------------------------------------------------------------


def test_the_work_of_these_tests_is_of_every_kind(alone):
    assert {answer.stopped for answer in alone} >= {"end", "length"}
    assert any(answer.pictures and answer.text for answer in alone)
    assert {len(answer.pictures) for answer in alone} >= {0, 1, 3}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 2},
        {"max_step_tokens": 1},
        {"max_cache_tokens": 700},
        {"pack_weights": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [0, 1, 5])
def test_answers_do_not_depend_on_what_else_is_running(tiny, alone, settings, every):
    """One request joins every `every` steps, each in the middle of the others' work."""
    engine = Engine(*tiny, **settings)
    requests = []
    for document, options, seed in work():
        requests.append(engine.submit(document, options, seed))
        for _ in range(every):
            engine.step()
    run(engine)
    for request, expected in zip(requests, alone, strict=True):
        assert_same(request.answer, expected)
    assert engine._cache.pages_in_use == 0
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_options_for_each_prompt(engine, alone):
    documents, options, seeds = zip(*work(), strict=True)
    for answer, expected in zip(engine.answers(documents, options, seeds), alone, strict=True):
        assert_same(answer, expected)


@pytest.fixture
def batches(monkeypatch):
    """Of every call of the UNet the step at which each picture was."""
    seen = []

    class Watched(denoising.Denoising):
        def step(self):
            seen.append([picture.steps_done for picture in self.pictures])
            return super().step()

    monkeypatch.setattr(picture_work, "Denoising", Watched)
    return seen


def test_pictures_of_several_requests_are_drawn_in_one_batch(engine, batches):
    engine.answers([prompt(f"photo {i}") for i in range(5)], replace(LONE, drawing=replace(QUICK, candidates=2)))
    assert batches == [[step] * 10 for step in range(3)]
    batches.clear()
    engine.answers([prompt(f"photo {i}") for i in range(5)], replace(LONE, drawing=replace(QUICK, batch_size=2)))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("drawing", [QUICK, replace(QUICK, scheduler="ddpm", steps=5), replace(OTHER, steps=4)])
def test_a_picture_joins_a_batch_that_has_begun_and_stays_the_same(engine, batches, drawing):
    """Whatever is denoised beside it, and at whatever step that is."""
    drawing = replace(drawing, scheduler="dpm++", steps=5) if drawing is QUICK else drawing
    options = replace(LONE, drawing=drawing)
    documents = [prompt(f"photo {i}") for i in range(4)]
    alone = [engine.answers([d], options, [i])[0].pictures[0] for i, d in enumerate(documents)]
    batches.clear()
    requests = []
    for i, document in enumerate(documents):
        requests.append(engine.submit(document, options, i))
        engine.step()
    run(engine)
    assert batches[:3] == [[0], [1, 0], [2, 1, 0]]
    assert batches[3] == [3, 2, 1, 0]
    for request, expected in zip(requests, alone, strict=True):
        (found,) = request.answer.pictures
        assert max(abs(x - y) for x, y in zip(found.tobytes(), expected.tobytes(), strict=True)) <= 1
    assert len({picture.tobytes() for picture in alone}) == 4


@pytest.mark.filterwarnings("ignore::dreamkernels.FallbackWarning")
def test_a_picture_joins_under_a_scheduler_that_takes_its_own_steps(tiny, monkeypatch):
    def unsupported(*_):
        raise UnsupportedScheduler("a test")

    engine, options = Engine(*tiny), replace(LONE, drawing=replace(QUICK, scheduler="ddpm", steps=4))
    wanted = [engine.answers([prompt("photo")], options, [seed])[0].pictures[0] for seed in range(2)]
    monkeypatch.setattr("dreamllm.inference.loop.step_schedule", unsupported)
    first = engine.submit(prompt("photo"), options, 0)
    engine.step()
    second = engine.submit(prompt("photo"), options, 1)
    run(engine)
    for request, expected in zip((first, second), wanted, strict=True):
        (found,) = request.answer.pictures
        assert max(abs(x - y) for x, y in zip(found.tobytes(), expected.tobytes(), strict=True)) <= 1


def test_candidates_share_their_condition(engine, monkeypatch):
    """One pass of the language model and one prepared condition per prompt, and one of the empty prompt."""
    prepared = []
    prepare = engine.model.prepare_condition
    monkeypatch.setattr(engine.model, "prepare_condition", lambda c: prepared.append(len(c)) or prepare(c))
    passes = []
    advance = engine._decoder.advance
    monkeypatch.setattr(engine._decoder, "advance", lambda *a: passes.append(len(a[1])) or advance(*a))
    engine.null_condition()
    passes.clear()
    answers = engine.answers(
        [prompt(f"photo {i}") for i in range(4)], replace(LONE, drawing=replace(QUICK, candidates=8, batch_size=32))
    )
    assert [len(answer.pictures) for answer in answers] == [8] * 4
    assert passes == [4]
    assert prepared == [1] * 5


def test_progress_counts_the_steps_of_all_pictures(engine):
    seen = []
    drawing = replace(QUICK, candidates=3, batch_size=2)
    engine.answers([prompt("A"), prompt("B")], replace(LONE, drawing=drawing), progress=lambda *at: seen.append(at))
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {2 * 3 * QUICK.steps}
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]


def test_texts_are_written_while_pictures_are_drawn(engine):
    lone = engine.submit(prompt("A photo"), replace(LONE, drawing=replace(QUICK, steps=8)))
    text = engine.submit(prompt("The license"), replace(TEXT, min_new_tokens=6))
    states = []
    while not lone.done:
        engine.step()
        states.append((lone.state, len(text.chosen)))
    assert {state for state, _ in states[:-1]} == {"drawing"}
    assert [count for _, count in states[:6]] == [1, 2, 3, 4, 5, 6]


def test_the_cache_is_kept_for_later_requests(engine):
    engine.answer(prompt("The license"), TEXT)
    cache = engine._cache
    engine.answer(prompt("A copy"), TEXT)
    assert engine._cache is cache


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_captured_calls_of_the_unet_give_the_same_pictures(tiny, monkeypatch):
    """On a CPU with a stand-in for the capture: batches of one, two, three and two pictures, at steps of their own."""
    captures = []
    graphs = GraphedCalls(capture=rerunning(captures))
    plain, engine = Engine(*tiny), Engine(*tiny)
    engine._pictures._graphs = graphs
    options = replace(LONE, drawing=replace(QUICK, scheduler="dpm++", steps=4))
    wanted = [plain.answers([prompt(f"photo {i}")], options, [i])[0].pictures[0] for i in range(3)]
    requests = []
    for i in range(3):
        requests.append(engine.submit(prompt(f"photo {i}"), options, i))
        engine.step()
    run(engine)
    for request, expected in zip(requests, wanted, strict=True):
        (found,) = request.answer.pictures
        assert max(abs(x - y) for x, y in zip(found.tobytes(), expected.tobytes(), strict=True)) <= 1
    assert captures == [2, 4, 8]  # both halves of one, two and four pictures


def test_graphs_are_refused_without_cuda(tiny):
    with pytest.raises(ValueError, match="cuda_graphs need a model on cuda, not on cpu"):
        Engine(*tiny, cuda_graphs=True)


@pytest.mark.gpu
def test_captured_steps_on_a_gpu_give_the_same_answers(tmp_path):
    model, processor = tiny_model(tmp_path)
    model = model.to("cuda")
    plain, graphed = (Engine(model, processor, cuda_graphs=on) for on in (False, True))
    documents, options, seeds = zip(*work(), strict=True)
    for answer, expected in zip(
        graphed.answers(documents, options, seeds), plain.answers(documents, options, seeds), strict=True
    ):
        assert_same(answer, expected)
    assert len(graphed._writing_graphs) > 0
    assert len(graphed._pictures._graphs) > 0


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"min_new_tokens": 12}, {"repetition_penalty": 1.8}, {"repetition_penalty": 0.7}])
def test_greedy_controls_are_those_of_transformers(engine, options):
    for document, *_ in work():
        answer = engine.answer(document, replace(TEXT, **options))
        encoded = engine.processor.encode(document)
        batch = engine.processor.pad([encoded])
        del batch["labels"]
        never = [*engine._never.nonzero().flatten().tolist(), engine.layout.dream_start]
        end = engine.layout.eos
        ids = engine.model.generate(
            **batch, max_new_tokens=12, do_sample=False, suppress_tokens=never, eos_token_id=end, **options
        )
        assert ids[0, len(encoded) :].tolist() == list(answer.token_ids)


# -- stop strings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_string_ends_the_answer(engine, beams):
    long = replace(TEXT, max_new_tokens=16, min_new_tokens=16, num_beams=beams)
    whole = engine.answer(prompt("The license"), long).text
    stop = whole[len(whole) // 2 :][:3]
    short = engine.answer(prompt("The license"), replace(long, stop=("never there", stop)))
    if beams == 1:
        assert short.text == whole[: whole.index(stop)]
        assert short.stopped == "stop"
        assert len(short.token_ids) < 16
    assert stop not in short.text


def test_a_stop_string_may_span_tokens_and_is_not_told(engine):
    vocabulary = engine.processor.tokenizer.get_vocab()
    engine._never[[i for token, i in vocabulary.items() if token.startswith("<0x")]] = True  # bytes of no character
    long = replace(TEXT, max_new_tokens=40, min_new_tokens=40)
    whole = engine.answer(prompt("The license"), long)
    ends = [len(engine.processor.decode_text(list(whole.token_ids[:n]))) for n in range(8, 38)]
    stops = [whole.text[end - 2 : end + 2] for end in ends]
    stop = next(stop for stop in stops if len(stop) == 4 and "\ufffd" not in stop)
    *events, answer = engine.stream(prompt("The license"), replace(long, stop=(stop,)))
    assert answer.stopped == "stop"
    assert "".join(event.text for event in events) == answer.text == whole.text[: whole.text.index(stop)]


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(9))
def test_events_tell_the_whole_answer_in_order(engine, alone, index):
    document, options, seed = work()[index]
    *events, answer = engine.stream(document, replace(options, seed=seed), preview_every=2)
    assert_same(answer, alone[index])
    told = []
    for event in events:
        if isinstance(event, NewPicture):
            told.append(event.picture)
        elif isinstance(event, NewText):
            if told and isinstance(told[-1], str):
                told[-1] += event.text
            else:
                told.append(event.text)
    parts = answer.document.parts
    assert told == [part.text if isinstance(part, Text) else part.source for part in parts if not isinstance(part, End)]
    previews = [(event.step, event.steps) for event in events if isinstance(event, Preview)]
    steps = (options.drawing or QUICK).steps
    assert previews == [(2, 3)] * (len(answer.pictures) if steps == 3 else 0)


def test_text_comes_token_by_token(engine):
    events = list(engine.stream(prompt("The license"), replace(TEXT, min_new_tokens=12)))
    assert sum(isinstance(event, NewText) for event in events) > 2


def test_leaving_a_stream_ends_the_work(engine):
    stream = engine.stream(prompt("The license"), TEXT)
    next(stream)
    assert engine.num_running == 1
    stream.close()
    assert engine.num_running == 0
    assert engine._cache.pages_in_use == 0


# -- control -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_cancelled_request_leaves_and_the_others_stay(engine, alone, after):
    requests = [engine.submit(*item) for item in work()]
    for _ in range(after):
        engine.step()
    gone = [request for request in requests[::2] if not request.done]
    for request in gone:
        request.cancel()
    run(engine)
    for request, expected in zip(requests, alone, strict=True):
        if request in gone:
            with pytest.raises(RuntimeError, match="was cancelled"):
                _ = request.answer
        else:
            assert_same(request.answer, expected)
    assert engine._cache is None or engine._cache.pages_in_use == 0


def test_cancelled_pictures_are_not_drawn_on(engine):
    request = engine.submit(prompt("A photo"), replace(LONE, drawing=replace(QUICK, steps=50)))
    engine.step()
    request.cancel()
    assert run(engine) == 0


def test_draw_now(engine):
    request = engine.submit(prompt("The license"), replace(TEXT, pictures="allow", max_pictures=3, min_new_tokens=9))
    while len(request.chosen) < 4 or request.state != "writing":
        engine.step()
    before = list(request.chosen)
    request.draw_now()
    engine.step()
    assert request.chosen == before
    assert request.state == "dreaming"
    run(engine)
    chosen = request.answer.token_ids.count(engine.layout.dream_start)
    assert len(request.answer.pictures) == chosen + 1
    with pytest.raises(ValueError, match="no picture can be drawn now"):
        request.draw_now()


def test_draw_now_where_pictures_are_forbidden(engine):
    request = engine.submit(prompt("The license"), TEXT)
    with pytest.raises(ValueError, match="no picture can be drawn now"):
        request.draw_now()
    request.cancel()
    run(engine)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_an_unreadable_picture_ends_its_request_alone(engine, alone, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    bad = engine.submit(prompt("<image>", [path]), TEXT)
    good = engine.submit(*work()[0])
    run(engine)
    assert isinstance(bad.error, PictureError)
    with pytest.raises(PictureError, match=r"notes\.png is not an image file"):
        _ = bad.answer
    assert_same(good.answer, alone[0])


def test_a_failing_listener_ends_its_request_alone(engine, alone):
    def fails(event):
        raise OSError("the client left")

    written = engine.submit(*work()[0], on_event=fails)
    drawn = engine.submit(*work()[5], on_event=fails)
    good = engine.submit(*work()[1])
    run(engine)
    for request in (written, drawn):
        with pytest.raises(OSError, match="the client left"):
            _ = request.answer
    assert_same(good.answer, alone[1])


def test_an_error_in_a_pass_ends_those_who_took_part_and_the_engine_goes_on(engine, alone, monkeypatch):
    requests = [engine.submit(*item) for item in work()]
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(engine._decoder, "advance", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError, match="no memory"):
            engine.step()
    assert all(isinstance(request.error, MemoryError) for request in requests)
    assert engine._cache.pages_in_use == 0
    assert_same(engine.answers(*([x] for x in work()[1]))[0], alone[1])


def test_answers_that_fail_leave_nothing_behind(engine, tmp_path):
    with pytest.raises(PictureError):
        engine.answers([prompt("The license"), prompt("<image>", [tmp_path / "missing.png"])], TEXT)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert engine._cache.pages_in_use == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(LONE, drawing=replace(QUICK, size=7)), "size must be a positive multiple of 2 pixels, not 7"),
        (
            replace(LONE, drawing=replace(QUICK, steps=2000)),
            "2000 steps were asked for, but the noise schedule",
        ),
        (replace(LONE, drawing=replace(QUICK, negative_prompt="bad " * 300)), "negative prompt of .* leaves no room"),
        (
            replace(TEXT, pictures="allow", drawing=replace(QUICK, candidates=2)),
            "2 candidates per picture",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt("A photo"), options)
    assert engine.num_waiting == 0


def test_a_request_that_cannot_fit_into_the_cache_is_refused(tiny):
    engine = Engine(*tiny, max_cache_tokens=64)
    with pytest.raises(ValueError, match=r"may need 256 positions of a cache of 64; shorten it"):
        engine.submit(prompt("A photo"), GenerationOptions())
    assert len(engine.answer(prompt("A photo"), replace(TEXT, min_new_tokens=12)).token_ids) == 12


def test_numbers_out_of_range_are_refused(tiny, engine):
    for name in ("batch_size", "max_step_tokens", "max_cache_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            Engine(*tiny, **{name: 0})
    with pytest.raises(ValueError, match="preview_every must be at least 0"):
        engine.submit(prompt("A photo"), TEXT, preview_every=-1)
    with pytest.raises(ValueError, match="1 options were given, but 2 are needed, one per prompt"):
        engine.answers([prompt("a"), prompt("b")], [TEXT])
    with pytest.raises(ValueError, match=r"a seed must be in \[0, 2\*\*63\), not -1"):
        engine.submit(prompt("A photo"), TEXT, seed=-1)
    for stop in ("text", ("",), (1,)):
        with pytest.raises(ValueError, match="stop must be a tuple of strings that are not empty"):
            GenerationOptions(stop=stop)
    with pytest.raises(ValueError, match="is empty; give it text or a picture"):
        engine.submit(Document(()))


def test_an_answer_that_is_not_done_says_so(engine):
    request = engine.submit(prompt("The license"), TEXT)
    with pytest.raises(RuntimeError, match="is not done yet"):
        _ = request.answer
    request.cancel()
    run(engine)


@pytest.mark.parametrize(
    ("decodings", "told"),
    [
        (["a", "a\ufffd", "a\ufffd\ufffd", "aé", "aéx"], ["a", "é", "x"]),  # the bytes of one character, one by one
        (["a\ufffdb", "a\ufffdbc"], ["a\ufffdb", "c"]),  # a byte that never becomes one
        (["a\ufffdb", "aéb", "aébcd"], ["a\ufffdb", "ébcd"]),  # what was told turns out otherwise: nothing is lost
        (["a", "a\ufffd"], ["a", "\ufffd"]),  # a character that stays incomplete
    ],
)
def test_a_stream_waits_for_whole_characters_and_loses_nothing(decodings, told):
    request = object.__new__(Request)
    events = []
    request.options, request._text_told, request._on_event = GenerationOptions(), "", events.append
    for text in decodings:
        request._tell(text, finished=False)
    request._tell(decodings[-1], finished=True)
    assert [event.text for event in events] == told
