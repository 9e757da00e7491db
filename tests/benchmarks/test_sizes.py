"""The sizes of the workloads: 7b is the published model, mini has its proportions."""

import pytest
import torch

from benchmarks.models.sizes import SIZES, build, costs
from benchmarks.models.synthetic import Source, make_processor


@pytest.fixture(scope="module")
def shares():
    return {name: costs(SIZES[name]).share_of_pair(SIZES[name]) for name in ("mini", "7b")}


def test_parameters_of_7b_are_those_of_the_specification():
    model = build(SIZES["7b"], "meta")
    counts = {name: sum(p.numel() for p in group) for name, group in model.parameter_groups().items()}
    assert all(p.is_meta for p in model.parameters())
    assert counts["dream_queries"] == 262_144
    assert counts["visual_projector"] == 4_198_400
    assert counts["condition_projector"] == 4_194_304
    language = counts["language_model"] + counts["embeddings"] + counts["lm_head"]
    assert round(language / 1e9, 2) == 6.74
    assert round(counts["vision_model"] / 1e6) == 303
    assert round(counts["unet"] / 1e6) == 866
    assert round(counts["vae"] / 1e6) == 84


def test_costs_of_7b_are_those_of_the_design():
    counted = costs(SIZES["7b"])
    assert counted.unet == pytest.approx(0.803e12, rel=0.01)
    assert counted.vae_encode == pytest.approx(1.12e12, rel=0.01)
    assert counted.vae_decode == pytest.approx(2.51e12, rel=0.01)
    assert counted.clip == pytest.approx(0.155e12, rel=0.06)
    assert counted.token == pytest.approx(13.2e9, rel=0.03)


@pytest.mark.parametrize("part", ["language model", "clip", "unet", "vae"])
def test_mini_has_the_shares_of_7b(part, shares):
    assert shares["mini"][part] == pytest.approx(shares["7b"][part], rel=0.25)


def test_the_same_seed_draws_the_same_documents():
    size = SIZES["tiny"]
    processor = make_processor(size)

    def encoded(seed):
        source = Source(size, seed)
        return processor.encode(source.interleaved()), processor.encode(source.dialogue())

    for mine, again in zip(encoded(3), encoded(3), strict=True):
        assert mine.input_ids == again.input_ids
        assert torch.equal(processor.target(mine.images), processor.target(again.images))
    assert encoded(3)[0].input_ids != encoded(4)[0].input_ids


def test_lengths_at_7b_are_those_of_the_specification():
    size = SIZES["7b"]
    processor = make_processor(size)
    source = Source(size)
    read = [len(processor.encode(source.comprehension_pair())) for _ in range(40)]
    assert 300 <= min(read) < max(read) <= 330
    drawn = [len(processor.encode(source.creation_pair())) for _ in range(40)]
    assert 40 + 68 <= min(drawn) < max(drawn) <= 70 + 68
    documents = [processor.encode(source.interleaved()) for _ in range(40)]
    assert 2 * 324 < sum(map(len, documents)) / 40 <= max(map(len, documents)) <= 2048
    assert {len(document.images) for document in documents} >= {1, 2, 3, 4, 5}
    assert all(len(document.images) == len(document.targets) for document in documents)


def test_every_word_is_one_token():
    processor = make_processor(SIZES["tiny"])
    ids = processor.encode_text("w0 w1 w2")
    assert len(ids) == 3
    assert processor.layout.bos not in ids
    assert processor.decode_text(ids) == "w0 w1 w2"
