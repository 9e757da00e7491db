"""`python -m dreamkernels info` says for every operator which launch parameters are used and where they come from."""

import json

import pytest
import torch

from dreamkernels import information
from dreamkernels.devices import ARCHITECTURES, load_device, tuned, use_tuned
from dreamkernels.devices.sources import launch_sources, origin_of_tuned
from dreamkernels.tuning.workloads import operators

GPU = "NVIDIA Testing 80GB"


@pytest.fixture
def stored(tmp_path):
    """A cache folder in which the first entry of one kernel was tuned on GPU."""
    use_tuned(tmp_path)
    entry = dict(load_device("sm_90").launch["geglu_forward"][0])
    path = tmp_path / "sm_90.json"
    provenance = {"gpu": GPU, "driver": "580.1", "torch": "2.11", "date": "2026-01-02", "commit": "abc"}
    tuned.store(path, "sm_90", GPU, provenance, "geglu_forward", entry | {"num_warps": 2})
    yield path
    use_tuned(True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_tables_belongs_to_an_operator(architecture):
    sources = launch_sources(architecture, "", operators())
    assert sum(source.entries for source in sources.values()) == sum(
        len(entries) for entries in load_device(architecture).launch.values()
    )
    assert {str(source) for source in sources.values()} == {"shipped"}


def test_tuned_entries_are_counted_where_they_are_used(stored):
    mine = launch_sources("sm_90", GPU, operators())
    assert (mine["geglu"].tuned, str(mine["rms_norm"])) == (1, "shipped")
    assert str(mine["geglu"]) == f"1 of {mine['geglu'].entries} tuned"
    only = launch_sources("sm_90", GPU, {"geglu": ["geglu_forward"]})
    assert str(only["geglu"]) == ("tuned" if only["geglu"].entries == 1 else f"1 of {only['geglu'].entries} tuned")
    assert str(launch_sources("sm_90", "another GPU", operators())["geglu"]) == "shipped"
    origin = origin_of_tuned("sm_90", GPU)
    assert all(word in origin for word in (GPU, "driver 580.1", "torch 2.11", "commit abc", "2026-01-02", str(stored)))
    assert origin_of_tuned("sm_90", "another GPU") == origin_of_tuned("sm_80", GPU) == ""


def test_the_text_shows_them(stored, monkeypatch):
    monkeypatch.setattr(information, "_architectures_here", lambda: ["sm_90"])
    monkeypatch.setattr(information, "model_served_by", lambda architecture: GPU)
    facts = information.collect()
    text = information.as_text(facts)
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["geglu"] and "tuned" in line]
    assert "1 of" in line
    assert f"sm_90 tuned: measured on {GPU}" in text
    assert f"sm_90 shipped: {load_device('sm_90').launch_provenance}" in text
    assert json.loads(json.dumps(facts)) == facts


def test_without_a_gpu_all_architectures_are_told():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text = information.as_text(information.collect())
    for architecture in ARCHITECTURES:
        assert f"{architecture} shipped: " in text
        assert f"{architecture} tuned:" not in text
        assert load_device(architecture).limits_provenance in text
