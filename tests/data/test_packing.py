"""Packs of a fixed number of tokens: full, fair, and of documents that do not see each other."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamllm.cli import main
from dreamllm.data import Batches, DocumentList, LoaderSettings, LoaderState, Mixture, Part, StepStream, measure_packing
from dreamllm.data.packing import Held, choose
from dreamllm.documents import Document, End, Picture, Text, pair
from dreamllm.workloads import make_processor
from dreamllm.workloads.stages import parts
from tests.data.lanes import assert_equal, digest, make, run
from tests.data.pictures import png, write_pairs
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).parents[2]
HELD = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def model_and_processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@given(items=HELD, tokens=st.integers(30, 60), pictures=st.none() | st.integers(3, 6))
@settings(deadline=None)
def test_the_choice_is_the_fullest_with_the_oldest_in_it(items, tokens, pictures):
    """Against trying all subsets."""
    held = [Held(i, length, count) for i, (length, count) in enumerate(items)]
    chosen = choose(held, tokens, pictures)

    def filled(subset) -> int:
        total = sum(held[i].tokens for i in subset)
        fits = total <= tokens and (pictures is None or sum(held[i].pictures for i in subset) <= pictures)
        return total if fits else -1

    others = range(1, len(held))
    every = itertools.chain.from_iterable(itertools.combinations(others, size) for size in range(len(held)))
    best = max(filled((0, *subset)) for subset in every)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert filled(chosen) == best


def test_of_equal_choices_the_older_documents_go():
    held = [Held(i, 10, 0) for i in range(6)]
    assert choose(held, 30) == [0, 1, 2]
    assert choose([Held(0, 10, 0), Held(1, 7, 0), *held[2:]], 30) == [0, 2, 3]


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="no documents to choose from"):
        choose([], 5)
    with pytest.raises(ValueError, match="a document of 9 tokens and 1 pictures does not fit into 8 tokens"):
        choose([Held(0, 9, 1)], 8)
    with pytest.raises(ValueError, match="does not fit into 10 tokens and 1 pictures"):
        choose([Held(0, 9, 2)], 10, 1)


@pytest.mark.parametrize("of", [1, 3])
def test_every_document_goes_out_once_and_none_waits_long(model_and_processor, of):
    loading = make(model_and_processor[1], tokens_per_batch=300, look_ahead=12, pictures_per_batch=4)
    seen = []
    for lane in range(of):
        born: dict[int, int] = {}
        plans = list(itertools.islice(loading.plans(lane, of), 60))
        for step, plan in enumerate(plans):
            for position in plan.state.held:
                born.setdefault(position, step)
            waited = [step - born.get(position, step) for position in plan.positions]
            assert max(waited) <= max(len(p.state.held) for p in plans)
        out = [position for plan in plans for position in plan.positions]
        assert len(out) == len(set(out))
        assert sorted([*out, *plans[-1].state.held]) == list(range(lane, plans[-1].state.position, of))
        seen += out
    assert len(seen) == len(set(seen))


def test_a_pack_never_exceeds_its_limits(model_and_processor):
    processor = model_and_processor[1]
    loading = make(processor, tokens_per_batch=300, look_ahead=6, pictures_per_batch=3, with_null=True)
    rows, _ = run(loading, 1, 1, LoaderState.initial(1), 30)
    for (loaded,) in rows:
        assert loaded.batch.num_tokens <= 300
        assert loaded.batch.dream_positions.shape[0] <= 3


def test_the_stage_two_mixture_is_packed_nearly_without_gaps():
    """The goal is 97%; documents padded to the longest of their batch leave half of the grid empty."""
    loading = Batches(
        Mixture(parts("stage2", "7b"), 0), make_processor("7b"), LoaderSettings(tokens_per_batch=8192, with_null=True)
    )
    report = measure_packing(loading, 15)
    assert report.fill >= 0.97
    assert report.padded_fill < 0.6
    assert report.longest_wait <= 64
    assert f"{report.fill:.1%} full" in str(report)
    assert f"padded to the longest: {report.padded_fill:.1%} full" in str(report)


def test_packing_is_shown_on_the_command_line(model_and_processor, tmp_path, capsys):
    model, processor = model_and_processor
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "data", 12)
    main(["data", "packing", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--tokens-per-batch", "300"])
    assert "100 packs of 300 tokens" in capsys.readouterr().out


def test_documents_of_a_pack_do_not_see_each_other(model_and_processor):
    """The gradient of one document's loss by the embeddings of the others is zero, not small."""
    model, processor = model_and_processor
    texts = [Document((Text("A fox in the snow"), End()), name=f"{i}") for i in range(2)]
    encoded = [processor.encode(d) for d in (texts[0], pair(png(1), "the license", "comprehension"), texts[1])]
    batch = processor.pack(encoded)
    embeds: list[torch.Tensor] = []

    def kept(*args):
        made = embed(*args).detach().requires_grad_()
        embeds.append(made)
        return made

    embed, model.embed = model.embed, kept
    try:
        states = model.states_packed(batch)
    finally:
        del model.embed
    for first, last in itertools.pairwise(batch.cu_seqlens.tolist()):
        (gradient,) = torch.autograd.grad(states[first:last].square().sum(), embeds[0], retain_graph=True)
        assert gradient[first:last].abs().sum() > 0
        assert not gradient[:first].any()
        assert not gradient[last:].any()


def test_an_unreadable_picture_leaves_a_gap_and_is_reported(model_and_processor):
    processor = model_and_processor[1]
    good = [pair(png(i), "a fox in the snow " * 4, "creation", f"good {i}") for i in range(6)]
    bad = [pair(b"no picture", "a fox in the snow " * 4, "creation", f"bad {i}") for i in range(2)]
    loading = Batches(
        Mixture([Part(DocumentList([*good, *bad], "mixed"))], 0), processor, LoaderSettings(tokens_per_batch=256)
    )
    rows, _ = run(loading, 1, 1, LoaderState.initial(1), 4)
    for (loaded,) in rows:
        lost = len(loaded.plan.positions) - loaded.batch.num_documents
        assert lost == len(loaded.problems)
        assert not any(name.startswith("bad") for name in loaded.batch.names)
    assert any(loaded.problems for (loaded,) in rows)


def test_a_pack_of_which_nothing_can_be_read_gets_another_document(model_and_processor):
    processor = model_and_processor[1]
    words = "snow " * 220
    bad, good = pair(b"no picture", words, "creation", "bad"), pair(png(0), words, "creation", "good")
    loading = Batches(
        Mixture([Part(DocumentList([bad, good], "m"))], 0),
        processor,
        LoaderSettings(tokens_per_batch=256, look_ahead=1),
    )
    rows, _ = run(loading, 1, 1, LoaderState.initial(1), 4)
    assert {loaded.batch.names for (loaded,) in rows} == {("good",)}
    assert {p.reason for (loaded,) in rows for p in loaded.problems if not p.kept} == {"corrupt_image"}


def test_a_document_that_grows_when_it_loses_a_picture_does_not_break_the_limit(model_and_processor):
    """Without its picture, text that did not fit does."""
    processor = model_and_processor[1]
    chunks = [Text("snow " * 60), Picture(b"no picture", True, True), Text("snow " * 60), Text("snow " * 200), End()]
    grows = Document(tuple(chunks), "stop", "grows")
    short = Document((Text("snow"), End()), "stop", "short")
    loading = Batches(
        Mixture([Part(DocumentList([grows, *[short] * 7], "m"))], 0), processor, LoaderSettings(tokens_per_batch=256)
    )
    rows, _ = run(loading, 1, 1, LoaderState.initial(1), 6)
    assert all(loaded.batch.num_tokens <= 256 for (loaded,) in rows)
    assert any(loaded.problems for (loaded,) in rows)


def test_a_document_with_more_pictures_than_a_pack_holds_is_left_out(model_and_processor):
    processor = model_and_processor[1]
    crowd = Document((*[Picture(png(0), creation=True)] * 3, End()), name="crowd")
    loading = Batches(
        Mixture([Part(DocumentList([crowd, pair(png(1), "x", "creation", "one")], "m"))], 0),
        processor,
        LoaderSettings(tokens_per_batch=256, pictures_per_batch=2),
    )
    ((loaded,),), _ = run(loading, 1, 1, LoaderState.initial(1), 1)
    assert set(loaded.batch.names) == {"one"}
    assert {p.reason for p in loaded.problems} == {"too_many_pictures"}
    assert "crowd creates 3 pictures; a batch holds at most 2" in loaded.problems[0].message


def test_torchdata_wraps_the_steps_and_resumes_them(model_and_processor):
    dataloader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    loading = make(model_and_processor[1], tokens_per_batch=300, look_ahead=8)

    def stream():
        return StepStream(loading, range(1, 3), 4, steps=6)

    straight = [[loaded.batch for loaded in step] for step in stream()]
    for workers in (0, 1):
        first = dataloader(stream(), batch_size=None, num_workers=workers)
        steps = iter(first)
        taken = [next(steps) for _ in range(2)]
        state = first.state_dict()
        again = dataloader(stream(), batch_size=None, num_workers=workers)
        again.load_state_dict(state)
        taken += list(again)
        assert len(taken) == len(straight)
        for step, expected in zip(taken, straight, strict=True):
            for loaded, batch in zip(step, expected, strict=True):
                assert_equal(loaded.batch, batch)


def test_a_stream_goes_on_from_its_state_and_refuses_to_be_multiplied(model_and_processor):
    loading = make(model_and_processor[1], tokens_per_batch=300, look_ahead=8)
    stream = StepStream(loading, range(2), 2, steps=5)
    straight = [step[0].plan for step in stream]
    assert stream.state.step == 5
    assert list(stream) == []
    begun = StepStream(loading, range(2), 2, steps=5)
    steps = iter(begun)
    head = [next(steps)[0].plan for _ in range(3)]
    rest = StepStream(loading, range(2), 2, steps=5)
    rest.load_state_dict(begun.state_dict())
    assert [*head, *(step[0].plan for step in rest)] == straight
    with pytest.raises(RuntimeError, match="2 workers would each load every step"):
        list(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2))


SHIFTED = """
import sys, time
from pathlib import Path
now = time.time
time.time = lambda: now() + 86_400_000
from tests.data.lanes import digest
print(digest(Path(sys.argv[1])))
"""


def test_clock_and_locale_do_not_change_a_batch(tmp_path):
    """Names and captions beyond ASCII, another time zone, another year, another hash seed: the same bytes."""
    for i, name in enumerate(("ä", "Z", "é", "狐", "a")):
        (tmp_path / f"{name}.png").write_bytes(png(i))
        (tmp_path / f"{name}.txt").write_text(f"w10 Straße {name}", encoding="utf-8")
    elsewhere = {"LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "2"}
    other = subprocess.run(
        [sys.executable, "-c", SHIFTED, str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, **elsewhere},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest(tmp_path)
