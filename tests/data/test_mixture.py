"""The order of documents: a permutation per epoch, proportions by virtual size, a function of the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamllm.data import DocumentList, Mixture, Part, Permutation, derive_seed, parse_size, uniform
from dreamllm.documents import Document, Text

PINNED = [2, 7, 4, 8, 3, 0, 6, 5, 9, 1]
PINNED_SEED = 8724105124395190220


def reader(count: int, name: str) -> DocumentList:
    return DocumentList([Document((Text(f"{name} {i}"),), name=f"{name}/{i}") for i in range(count)], name)


def names(mixture: Mixture, start: int, stop: int) -> list[str]:
    return [mixture.draw(position).document().name for position in range(start, stop)]


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_visits_everything_once(size, seed):
    assert sorted(Permutation(size, seed)) == list(range(size))


def test_permutations_look_random():
    sums = Counter(Permutation(97, seed)[5] for seed in range(4000))
    assert max(sums.values()) < 80  # 41 expected; a binomial passes 80 with probability below 1e-6
    same = sum(Permutation(1000, 1)[i] == Permutation(1000, 2)[i] for i in range(1000))
    assert same < 10


def test_a_permutation_of_a_huge_range_needs_no_memory():
    huge = Permutation(10**15, 7)
    assert len({huge[i] for i in range(1000)}) == 1000
    assert Permutation(10**15, 7)[123456789] == huge[123456789]


def test_the_order_never_changes_between_versions():
    assert [Permutation(10, 42)[i] for i in range(10)] == PINNED
    assert derive_seed(42, "stage1", 3) == PINNED_SEED


def test_each_epoch_is_every_document_once_in_another_order():
    mixture = Mixture([Part(reader(30, "a"))], seed=5)
    first, second = names(mixture, 0, 30), names(mixture, 30, 60)
    assert sorted(first) == sorted(second) == sorted(f"a/{i}" for i in range(30))
    assert first != second


def test_virtual_sizes_are_the_proportions():
    mixture = Mixture([Part(reader(10, "a"), size=30), Part(reader(50, "b"), size="20")], seed=0)
    drawn = names(mixture, 0, len(mixture))
    counts = Counter(name.split("/")[0] for name in drawn)
    assert counts == {"a": 30, "b": 20}
    assert set(Counter(n for n in drawn if n.startswith("a")).values()) == {3}


def test_a_reader_longer_than_its_virtual_size_is_seen_whole():
    mixture = Mixture([Part(reader(50, "b"), size=20), Part(reader(5, "a"))], seed=0)
    five_epochs = [n for n in names(mixture, 0, 5 * len(mixture)) if n.startswith("b")]
    assert Counter(five_epochs) == {f"b/{i}": 2 for i in range(50)}


def test_weights_share_the_sum_of_the_lengths():
    mixture = Mixture([Part(reader(60, "a"), weight=1), Part(reader(40, "b"), weight=3)], seed=0)
    assert mixture.sizes == [25, 75]


def test_the_order_is_a_function_of_the_seed():
    parts = [Part(reader(20, "a")), Part(reader(30, "b"), size=7)]
    straight = names(Mixture(parts, 9), 0, 100)
    scattered = Mixture(parts, 9)
    assert [names(scattered, p, p + 1)[0] for p in reversed(range(100))] == straight[::-1]
    assert names(Mixture(parts, 10), 0, 100) != straight


def test_repeated_visits_of_a_sample_are_different_epochs():
    mixture = Mixture([Part(reader(4, "a"), size=12)], seed=1)
    visits = Counter((draw.index, draw.epoch) for draw in map(mixture.draw, range(24)))
    assert visits == {(index, epoch): 1 for index in range(4) for epoch in range(6)}


@pytest.mark.parametrize(("text", "number"), [("20M", 20_000_000), ("558K", 558_000), ("1.5m", 1_500_000), (7, 7)])
def test_sizes_are_read_as_people_write_them(text, number):
    assert parse_size(text) == number


@pytest.mark.parametrize("text", ["", "0", "-3", "20 G", "many", -1])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="not a positive number"):
        parse_size(text)


def test_wrong_mixtures_are_refused():
    some = reader(3, "a")
    with pytest.raises(ValueError, match="at least one reader"):
        Mixture([], 0)
    with pytest.raises(ValueError, match="reader none is empty"):
        Mixture([Part(reader(0, "none"))], 0)
    with pytest.raises(ValueError, match="every part of a mixture a weight"):
        Mixture([Part(some, weight=1), Part(some)], 0)
    with pytest.raises(ValueError, match="must be positive"):
        Mixture([Part(some, weight=0)], 0)


def test_uniform_numbers_fill_the_unit_interval():
    values = [uniform(3, "x", i) for i in range(2000)]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(sum(values) / 2000 - 0.5) < 0.03
