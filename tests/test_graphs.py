"""What is captured, kept and thrown away; the capture itself is CUDA's, and tested there by its users."""

import pytest
import torch

from dreamkernels import GraphedCalls, addresses_of, bucket_of
from tests.support.graphs import rerunning


def test_a_call_is_captured_once_per_key_and_shape():
    captures = []
    graphs = GraphedCalls(capture=rerunning(captures))

    def double(x, y):
        return 2 * x + y

    for rows in (1, 2, 1, 2, 2):
        x, y = torch.randn(rows, 3), torch.randn(rows, 3)
        assert torch.equal(graphs("double", double, x, y), 2 * x + y)
    assert len(captures) == len(graphs) == 2
    graphs("another", double, x, y)
    graphs("double", double, x.double(), y.double())
    assert len(captures) == len(graphs) == 4


def test_the_buffers_stay_and_the_inputs_are_not_kept():
    graphs = GraphedCalls(capture=rerunning([]))
    x = torch.ones(2)
    first = graphs("add", lambda x: x + 1, x)
    address = first.data_ptr()
    assert first.tolist() == [2.0, 2.0]
    second = graphs("add", lambda x: x + 1, torch.zeros(2))
    assert second.data_ptr() == address
    assert first.tolist() == [1.0, 1.0]  # the result is overwritten, as documented
    assert x.tolist() == [1.0, 1.0]


def test_the_graph_used_longest_ago_is_given_up():
    captures = []
    graphs = GraphedCalls(most=2, capture=rerunning(captures))
    for rows in (1, 2, 1, 3, 1, 2):
        graphs("same", lambda x: x + 1, torch.zeros(rows))
    assert len(graphs) == 2
    assert len(captures) == 4  # 1, 2, 3 and again 2, which 3 had displaced


def test_buckets_are_powers_of_two():
    assert [bucket_of(count) for count in (1, 2, 3, 4, 5, 8, 9, 33)] == [1, 2, 4, 4, 8, 8, 16, 64]
    with pytest.raises(ValueError, match="at least one row, not 0"):
        bucket_of(0)
    with pytest.raises(ValueError, match="at least one graph must be kept, not 0"):
        GraphedCalls(most=0)


def test_a_moved_parameter_has_another_address():
    layer = torch.nn.Linear(2, 2)
    before = addresses_of(layer.parameters())
    layer.weight.data.mul_(2)
    assert addresses_of(layer.parameters()) == before
    layer.weight.data = layer.weight.data.clone()
    assert addresses_of(layer.parameters()) != before


@pytest.mark.gpu
def test_a_captured_call_computes_the_same():
    graphs = GraphedCalls()
    weight = torch.randn(64, 64, device="cuda")
    for seed in range(3):
        x = torch.randn(5, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        torch.testing.assert_close(graphs("product", lambda x: (x @ weight).relu(), x), (x @ weight).relu())
    assert len(graphs) == 1
