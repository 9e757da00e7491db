"""The Inception network of FID and the CLIP judge, by structure and on random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from dreamllm.evaluation.metrics import (
    clip_score,
    inception_pixels,
    load_inception,
)
from dreamllm.inference import ClipJudge, best_candidate
from tests.evaluation.metrics.oracles import functions_of
from tests.evaluation.networks import random_inception, write_clip
from tests.tiny import random_picture

PUBLISHED = 27_161_264
"""Parameters of Inception V3 with 1000 classes and its auxiliary classifier, as torchvision publishes it."""
AUXILIARY = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000


@pytest.fixture(scope="module")
def network():
    return random_inception()


def test_the_network_has_the_published_number_of_parameters(network):
    """The FID network has 1008 outputs instead of 1000."""
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED - AUXILIARY + 8 * (2048 + 1)


def test_shapes_are_those_of_the_paper(network):
    """Szegedy et al. 2016, table 1: 35x35x288, 17x17x768, 8x8x1280 and 8x8x2048."""
    seen = {}
    for name in ("Mixed_5d", "Mixed_6e", "Mixed_7a", "Mixed_7c"):
        getattr(network, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.shape[1:]}))
    features = network(torch.rand(1, 3, 299, 299))
    assert features.shape == (1, 2048)
    assert network.classify(features).shape == (1, 1008)
    expected = {
        "Mixed_5d": (288, 35, 35),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7a": (1280, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }
    assert seen == expected


def test_features_are_those_of_torch_fidelity(network):
    names = ("BasicConv2d", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE_1", "InceptionE_2")
    file = "feature_extractor_inceptionv3.py"
    theirs = SimpleNamespace(**functions_of("torch_fidelity", file, *names, torch=torch, nn=torch.nn, F=F))
    blocks = {
        "Mixed_5b": theirs.InceptionA(192, pool_features=32),
        "Mixed_6a": theirs.InceptionB(288),
        "Mixed_6b": theirs.InceptionC(768, channels_7x7=128),
        "Mixed_7a": theirs.InceptionD(768),
        "Mixed_7b": theirs.InceptionE_1(1280),
        "Mixed_7c": theirs.InceptionE_2(2048),
    }
    for name, block in blocks.items():
        ours = getattr(network, name)
        block.eval().load_state_dict(ours.state_dict())
        x = torch.rand(1, next(ours.children()).conv.in_channels, 9, 9)
        torch.testing.assert_close(ours(x), block(x))


def test_weights_come_from_a_file(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "pt_inception.pth")
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    x = torch.rand(1, 3, 299, 299)
    for name in ("pt_inception.pth", "inception.safetensors"):
        assert torch.equal(load_inception(tmp_path / name)(x), network(x))


def test_other_weights_are_described(network, tmp_path):
    state = dict(network.state_dict())
    del state["Mixed_7c.branch_pool.bn.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"1 tensors are missing.*the first: Mixed_7c.branch_pool.bn.bias"):
        load_inception(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="do not exist"):
        load_inception(tmp_path / "b.pth")


def test_pictures_become_pixels():
    grey = Image.new("L", (20, 10), 255)
    for mode in ("bilinear", "clean"):
        torch.testing.assert_close(inception_pixels([grey], mode), torch.ones(1, 3, 299, 299))
    picture = random_picture(0, 299)
    exact = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(inception_pixels([picture], "bilinear")[0], exact)
    torch.testing.assert_close(inception_pixels([picture], "clean")[0], exact)
    large = random_picture(1, 598)
    means = [float(inception_pixels([large], mode).std()) for mode in ("bilinear", "clean")]
    assert means[0] > 1.15 * means[1]  # only "clean" averages before it samples
    with pytest.raises(ValueError, match="resize must be 'bilinear' or 'clean', not 'other'"):
        inception_pixels([picture], "other")


def test_clean_is_that_of_clean_fid():
    space = functions_of("cleanfid", "resize.py", "make_resizer", Image=Image, np=np)
    picture = random_picture(2, 100)
    theirs = torch.from_numpy(space["make_resizer"]("PIL", False, "bicubic", (299, 299))(np.asarray(picture)))
    torch.testing.assert_close(inception_pixels([picture], "clean")[0], theirs.permute(2, 0, 1) / 127.5 - 1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return ClipJudge(folder)


def test_agreement_is_the_models_own_logit(judge):
    pictures, texts = [random_picture(i, 20) for i in range(3)], ["a red dog", "the blue cat on the beach"]
    found = judge.agreement(pictures, texts)
    model = judge._model
    pixels = judge._pictures(pictures, return_tensors="pt")["pixel_values"]
    batch = judge._texts(texts, padding=True, return_tensors="pt")
    logits = model(pixel_values=pixels, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(found, (logits.logits_per_image / model.logit_scale.exp()).detach())
    assert (found.abs() <= 1 + 1e-6).all()


def test_long_texts_are_cut(judge):
    assert judge.agreement([random_picture(0)], ["a dog " * 100]).shape == (1, 1)


def test_what_cannot_be_judged_is_refused(judge, tmp_path):
    with pytest.raises(ValueError, match="at least one picture and one text"):
        judge.agreement([], ["a"])
    with pytest.raises(FileNotFoundError, match="is not a folder with a CLIP model"):
        ClipJudge(tmp_path)


def test_the_best_candidate_agrees_best_with_any_caption():
    agreement = torch.tensor([[0.1, 0.2], [0.5, 0.0], [0.4, 0.4], [0.5, 0.1]])
    assert best_candidate(agreement) == 1
    with pytest.raises(ValueError, match=r"\[candidates, captions\]"):
        best_candidate(torch.zeros(0, 2))


def test_clip_score_is_never_negative():
    assert clip_score(0.3) == pytest.approx(0.75)
    assert clip_score(-0.3) == 0
