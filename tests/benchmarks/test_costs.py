"""What the parts of the workloads' models cost: 7b as the design says, mini in its proportions."""

import pytest

from benchmarks.models.costs import costs


@pytest.fixture(scope="module")
def shares():
    return {name: costs(name).share_of_pair(name) for name in ("mini", "7b")}


def test_costs_of_7b_are_those_of_the_design():
    counted = costs("7b")
    assert counted.unet == pytest.approx(0.803e12, rel=0.01)
    assert counted.vae_encode == pytest.approx(1.12e12, rel=0.01)
    assert counted.vae_decode == pytest.approx(2.51e12, rel=0.01)
    assert counted.clip == pytest.approx(0.155e12, rel=0.06)
    assert counted.token == pytest.approx(13.2e9, rel=0.03)


@pytest.mark.parametrize("part", ["language model", "clip", "unet", "vae"])
def test_mini_has_the_shares_of_7b(part, shares):
    assert shares["mini"][part] == pytest.approx(shares["7b"][part], rel=0.25)
