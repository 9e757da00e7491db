"""Steps of several lanes: the same documents from any number of processes and workers, from any moment on."""

from __future__ import annotations

import json
import random

import pytest

from dreamllm.data import BatchPlan, LaneState, LoaderSettings, LoaderState, load_steps
from tests.data.lanes import assert_equal, make, run
from tests.tiny import tiny_model

LANES, STEPS = 4, 6
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores
FILLED = {
    "documents": {"documents_per_batch": 3, "with_null": True},
    "tokens": {"tokens_per_batch": 400, "look_ahead": 9, "flip_targets": True},
    "tokens and pictures": {"tokens_per_batch": 300, "look_ahead": 5, "pictures_per_batch": 4, "with_null": True},
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))[1]


@pytest.fixture(scope="module", params=list(FILLED))
def batches(request, processor):
    return make(processor, **FILLED[request.param])


@pytest.fixture(scope="module")
def straight(batches):
    """All steps in one go, in one process without workers."""
    return run(batches, LANES, 1, LoaderState.initial(LANES), STEPS)


def assert_same(rows, expected) -> None:
    for row, other in zip(rows, expected, strict=True):
        for a, b in zip(row, other, strict=True):
            assert a.plan == b.plan
            assert a.problems == b.problems
            assert_equal(a.batch, b.batch)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 0), (1, 1), (2, 3)])
def test_processes_and_workers_do_not_change_a_step(batches, straight, ranks, workers):
    rows, state = run(batches, LANES, ranks, LoaderState.initial(LANES), STEPS, workers)
    assert_same(rows, straight[0])
    assert state == straight[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_stopped_anywhere_goes_on_with_any_number_of_processes(batches, straight, seed):
    """What was prefetched when it stopped is forgotten; the state is that of the last step consumed."""
    rng = random.Random(seed)
    rows, state, done = [], LoaderState.initial(LANES), 0
    while done < STEPS:
        steps, ranks, workers = rng.randint(1, 3), rng.choice((1, 2, 4)), rng.choice((0, 1, 3))
        steps = min(steps, STEPS - done)
        state = LoaderState.from_json(json.loads(json.dumps(state.to_json())))
        assert state.step == done
        more, state = run(batches, LANES, ranks, state, steps, workers if seed == 0 else 0)
        rows += more
        done += steps
    assert_same(rows, straight[0])
    assert state == straight[1]


def test_a_loader_that_is_left_in_the_middle_is_where_its_last_step_was(batches, straight):
    state = LoaderState.initial(LANES)
    loading = load_steps(batches, range(LANES), LANES, state, workers=2)
    for _ in range(2):
        state = state.after(loaded.plan for loaded in next(loading))
    loading.close()
    rows, state = run(batches, LANES, 1, state, STEPS - 2)
    assert_same(rows, straight[0][2:])
    assert state == straight[1]


def test_a_batch_is_a_function_of_its_plan(batches, straight):
    for loaded in straight[0][-1]:
        assert_equal(batches.load(loaded.plan).batch, loaded.batch)


def test_with_a_fixed_number_of_documents_the_state_is_the_step(processor):
    made = make(processor, documents_per_batch=2)
    rows, state = run(made, 2, 1, LoaderState.initial(2), 3)
    assert state.to_json() == {"0": {"step": 3}, "1": {"step": 3}}
    numbers = [[loaded.number for loaded in row] for row in rows]
    assert numbers == [[0, 1], [2, 3], [4, 5]]
    for row in rows:
        for loaded in row:
            assert_equal(loaded.batch, made[loaded.number].batch)
            assert loaded.plan.positions == (2 * loaded.number, 2 * loaded.number + 1)


def test_states_are_merged_and_shared_out():
    whole = LoaderState({lane: LaneState(3, 40 + lane, (lane,)) for lane in range(4)})
    halves = [whole.of(range(2)), whole.of(range(2, 4))]
    assert LoaderState.merge(reversed(halves)) == whole
    assert whole.after([BatchPlan(13, 1, (5,), LaneState(4))]).lanes[1] == LaneState(4)
    with pytest.raises(ValueError, match=r"lanes \[0, 1\] are in the states of two"):
        LoaderState.merge([halves[0], whole])
    with pytest.raises(ValueError, match="holds the lanes 0, 1, not 2, 3"):
        halves[0].of(range(2, 4))
    with pytest.raises(ValueError, match=r"before different steps: \[3, 4\]"):
        _ = whole.after([BatchPlan(13, 1, (5,), LaneState(4))]).step


@pytest.mark.parametrize("lanes", [range(0), range(2, 5), range(0, 4, 2), range(-1, 2)])
def test_lanes_outside_the_run_are_refused(processor, lanes):
    made = make(processor, documents_per_batch=2)
    with pytest.raises(ValueError, match=r"must be a part of range\(4\)"):
        next(load_steps(made, lanes, 4, LoaderState.initial(4)))


def test_settings_that_contradict_each_other_are_refused(processor):
    for both in ({}, {"documents_per_batch": 2, "tokens_per_batch": 500}):
        with pytest.raises(ValueError, match="either documents_per_batch or tokens_per_batch"):
            LoaderSettings(**both)
    with pytest.raises(ValueError, match="pictures_per_batch limits batches of tokens_per_batch"):
        LoaderSettings(2, pictures_per_batch=3)
    for name in ("documents_per_batch", "tokens_per_batch"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            LoaderSettings(**{name: 0})
    with pytest.raises(ValueError, match="look_ahead must be at least 1"):
        LoaderSettings(tokens_per_batch=500, look_ahead=0)
    with pytest.raises(ValueError, match=r"tokens_per_batch 258 must hold a document of 256 tokens .* prompt of 7"):
        make(processor, tokens_per_batch=258, with_null=True)
    with pytest.raises(TypeError, match="take them from load_steps"):
        make(processor, tokens_per_batch=300)[0]
