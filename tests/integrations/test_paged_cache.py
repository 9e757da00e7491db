"""The key-value cache in pages: what sequences share, when pages are copied, what becomes free."""

import pytest
import torch

from dreamkernels.integrations.paged_cache import CacheFullError, KeyValueCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def new_cache(**options):
    return KeyValueCache(LAYERS, HEADS, WIDTH, torch.float32, torch.device("cpu"), **{"page_size": 4} | options)


def write(cache, sequence, values):
    """Appends positions whose keys hold `values` and whose values hold minus them, in every layer."""
    first = sequence.length
    cache.extend([sequence], [len(values)])
    table = cache.block_table([sequence])[0].tolist()
    for position, value in enumerate(values, first):
        page, slot = table[position // cache.page_size], position % cache.page_size
        for layer in range(LAYERS):
            cache.keys(layer)[page, slot] = value + layer
            cache.values(layer)[page, slot] = -value - layer


def read(cache, sequence, layer=0):
    pages = cache.block_table([sequence])[0].long()
    keys, values = (t[pages].flatten(0, 1)[: sequence.length, 0, 0] for t in (cache.keys(layer), cache.values(layer)))
    assert torch.equal(keys, -values)
    return (keys - layer).tolist()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 21])
def test_forks_continue_on_their_own(length):
    cache = new_cache()
    origin = cache.new()
    write(cache, origin, range(length))
    forks = [cache.fork(origin) for _ in range(3)]
    for i, fork in enumerate(forks):
        write(cache, fork, [100 + i, 200 + i])
    write(cache, origin, [7])
    for layer in range(LAYERS):
        assert read(cache, origin, layer) == [*range(length), 7]
        for i, fork in enumerate(forks):
            assert read(cache, fork, layer) == [*range(length), 100 + i, 200 + i]


def test_forks_share_full_pages_and_the_last_heir_copies_nothing():
    cache = new_cache()
    origin = cache.new()
    write(cache, origin, range(10))  # two full pages and one of two positions
    assert cache.pages_in_use == 3
    forks = [cache.fork(origin) for _ in range(5)]
    assert cache.pages_in_use == 3
    cache.release(origin)
    for fork in forks:
        write(cache, fork, [1])
    assert cache.pages_in_use == 2 + 5
    assert len({fork.pages[0] for fork in forks}) == len({fork.pages[1] for fork in forks}) == 1


def test_everything_is_free_in_the_end():
    cache = new_cache()
    generator = torch.Generator().manual_seed(0)
    sequences = {}
    for step in range(400):
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0 or not sequences:
            sequence = cache.new()
            sequences[sequence.row] = (sequence, [])
        else:
            rows = sorted(sequences)
            sequence, content = sequences[rows[int(torch.randint(len(rows), (), generator=generator))]]
            if kind == 1:
                fork = cache.fork(sequence)
                sequences[fork.row] = (fork, list(content))
            elif kind == 2:
                more = [1000 * step + i for i in range(int(torch.randint(1, 9, (), generator=generator)))]
                write(cache, sequence, more)
                content += more
            else:
                assert read(cache, sequence) == content
                cache.release(sequence)
                del sequences[sequence.row]
    for sequence, content in sequences.values():
        assert read(cache, sequence) == content
        cache.release(sequence)
    assert cache.pages_in_use == 0


def test_growth_keeps_what_is_written():
    cache = new_cache(page_size=1)
    first, second = cache.new(), cache.new()
    write(cache, first, range(40))
    before = cache.num_pages
    write(cache, second, range(1000, 1200))
    assert cache.num_pages > before
    assert read(cache, first) == list(range(40))
    assert read(cache, second) == list(range(1000, 1200))


def test_a_full_cache_says_so():
    cache = new_cache(max_pages=3)
    sequence = cache.new()
    write(cache, sequence, range(12))
    with pytest.raises(CacheFullError, match="of 3 pages of 4 positions is full; answer fewer requests"):
        cache.extend([sequence], [1])
    cache.release(sequence)
    write(cache, cache.new(), range(12))


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"max_pages": 0}])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        new_cache(**wrong)
