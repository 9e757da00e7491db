"""Recipe `digits` from end to end, with few steps: what each stage may change, what is written, what a rerun keeps."""

import json
import random
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from dreamllm.documents import End, Picture, Text
from dreamllm.evaluation.digits_scans import load_scans
from dreamllm.model import DreamLLM
from dreamllm.recipes.digits import documents, recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of very few steps, and how often the stages were trained when it was repeated."""
    out = tmp_path_factory.mktemp("digits")
    few = replace(recipe.EVALUATION, created_per_digit=1, counting_documents=8, max_new_tokens=4, drawing=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "EVALUATION", few)
        patch.setitem(recipe.DRAWING, "steps", 2)
        model = recipe.run(out, seed=5, scale=0.01)
        assert model == out / "model"
        before = weights(out / "model")
        recipe.run(out, seed=5, scale=0.01)
    return out, before


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name for name in before if not before[name].equal(after[name])}


def test_stages_change_exactly_their_parameters(finished):
    out, _ = finished
    start = weights(out / "start")
    comprehension, creation, interleaved, final = (
        weights(out / part / "model") if part else weights(out / "model")
        for part in ("stage1-comprehension", "stage1-creation", "stage2", "")
    )
    assert {name.split(".")[0] for name in changed(start, comprehension)} == {"visual_projector"}
    assert {name.split(".")[0] for name in changed(comprehension, creation)} == {"dream_queries", "condition_projector"}
    for before, after in ((creation, interleaved), (interleaved, final)):
        parts = {name.split(".")[0] for name in changed(before, after)}
        assert parts == {"language_model", "visual_projector", "dream_queries", "condition_projector"}


def test_components_are_those_of_the_component_folders(finished):
    out, _ = finished
    unet = load_file(out / "components" / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors")
    final = DreamLLM.from_pretrained(out / "model")
    assert all(tensor.equal(unet[name]) for name, tensor in final.unet.state_dict().items())


def test_everything_is_written(finished):
    out, _ = finished
    results = json.loads((out / "evaluation" / "digits.json").read_text())
    for name in ("captions", "creation", "counting", "judge"):
        assert 0 <= results[name]["share"] <= 1
        assert results[name]["total"] > 0
    assert results["captions"]["target"] == 0.93
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_rerun_keeps_what_is_complete(finished):
    out, before = finished
    assert not changed(before, weights(out / "model"))


def test_counting_documents_count():
    train, _ = load_scans()
    for seed in range(50):
        parts = documents.counting_document(train, random.Random(seed)).parts
        assert isinstance(parts[-1], End)
        words = [documents.WORDS.index(part.text) for part in parts if isinstance(part, Text)]
        assert words == list(range(words[0], words[0] + len(words)))
        created = [part for part in parts if isinstance(part, Picture) and part.creation]
        assert created


def test_documents_follow_from_seed_and_position():
    train, _ = load_scans()
    reader = documents.RandomDocuments("counting", documents.counting_document, train, seed=1)
    texts = [[p.text for p in reader.document(i, e).parts if isinstance(p, Text)] for i in range(20) for e in (0, 1)]
    again = [[p.text for p in reader.document(i, e).parts if isinstance(p, Text)] for i in range(20) for e in (0, 1)]
    assert texts == again
    assert len({str(t) for t in texts}) > 5
    with pytest.raises(IndexError):
        reader.document(len(reader))


def test_scans_to_learn_from_and_to_be_judged_on_are_apart():
    train, unseen = load_scans()
    assert (len(train), len(unseen)) == (1500, 297)
    assert not {p.tobytes() for p in train.pictures} & {p.tobytes() for p in unseen.pictures}


def test_scale_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="scale must be positive"):
        recipe.run(tmp_path / "out", scale=0)
