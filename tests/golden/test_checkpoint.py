"""The original's checkpoint layout: reading every form of it, writing it back exactly, naming what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamllm.model import CheckpointError, DreamLLM, convert_from_original, convert_to_original, load_original
from dreamllm.model.original import CLIP_FILE, DREAM_FILE, HEAD_FILE, PLUGIN_PREFIXES
from tests.golden import reference

PLUGINS = (CLIP_FILE, DREAM_FILE, HEAD_FILE)


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(reference.CHECKPOINT, tmp_path / "checkpoint")


def load(folder):
    return load_original(folder, reference.CLIP, reference.DIFFUSION)[0]


def assert_same_tensors(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_round_trip_through_our_folder_is_exact(tmp_path):
    convert_from_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION, tmp_path / "ours")
    convert_to_original(tmp_path / "ours", tmp_path / "theirs")
    back = tmp_path / "theirs"
    assert_same_tensors(load_file(back / "model.safetensors"), load_file(reference.CHECKPOINT / "model.safetensors"))
    for name in PLUGINS:
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (back, reference.CHECKPOINT))
        assert_same_tensors(ours, theirs)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json"):
        assert json.loads((back / name).read_text()) == json.loads((reference.CHECKPOINT / name).read_text()), name
    assert (back / "tokenizer.model").read_bytes() == (reference.CHECKPOINT / "tokenizer.model").read_bytes()


def test_pickled_language_model_is_read(checkpoint):
    expected = load(checkpoint).state_dict()
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    assert_same_tensors(load(checkpoint).state_dict(), expected)


def test_sharded_language_model_is_read(checkpoint):
    expected = load(checkpoint).state_dict()
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({n: tensors[n] for n in half}, checkpoint / file)
    index = {"weight_map": {n: file for file, half in halves.items() for n in half}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_tensors(load(checkpoint).state_dict(), expected)


def test_gathered_file_with_plugins_inside_is_read(checkpoint):
    expected = load(checkpoint).state_dict()
    everything = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    for file, prefix in PLUGIN_PREFIXES.items():
        plugin = torch.load(checkpoint / file, weights_only=True)
        everything |= {prefix + name: tensor for name, tensor in plugin.items()}
        (checkpoint / file).unlink()
    torch.save(everything, checkpoint / "pytorch_model.bin")
    assert_same_tensors(load(checkpoint).state_dict(), expected)


def test_legacy_query_file_is_read(checkpoint):
    expected = load(checkpoint).state_dict()
    (checkpoint / DREAM_FILE).rename(checkpoint / "dream_queries.pt")
    assert_same_tensors(load(checkpoint).state_dict(), expected)


def test_rotary_buffers_may_be_absent(checkpoint):
    expected = load(checkpoint).state_dict()
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "rotary" not in n}, checkpoint / "model.safetensors")
    assert_same_tensors(load(checkpoint).state_dict(), expected)


def test_wrong_ids_in_the_configuration_are_ignored(checkpoint):
    path = checkpoint / "config.json"
    wrong = json.loads(path.read_text()) | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    path.write_text(json.dumps(wrong))
    config = load(checkpoint).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 800)


def test_missing_tensor_is_named(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model.layers.1.mlp.up_proj.weight \[176, 64\]"):
        load(checkpoint)


def test_misshaped_tensor_is_named_with_both_shapes(checkpoint):
    head = torch.load(checkpoint / HEAD_FILE, weights_only=True)
    head["unet.conv_out.bias"] = torch.zeros(5)
    torch.save(head, checkpoint / HEAD_FILE)
    with pytest.raises(CheckpointError, match=r"wrong shape: conv_out.bias, expected \[4\], found \[5\]"):
        load(checkpoint)


def test_missing_plugin_is_named(checkpoint):
    (checkpoint / DREAM_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"neither dream_embedding\.bin nor dream_queries\.pt"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", CLIP_FILE])
def test_truncated_file_is_named(checkpoint, name):
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


class _Malicious:
    def __reduce__(self):
        return (open, ("executed.txt", "w"))


def test_code_in_a_pickle_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"dream_queries": _Malicious()}, checkpoint / DREAM_FILE)
    with pytest.raises(CheckpointError, match=DREAM_FILE):
        load(checkpoint)
    assert not (tmp_path / "executed.txt").exists()


def test_our_folder_names_what_does_not_fit(tmp_path):
    convert_from_original(reference.CHECKPOINT, reference.CLIP, reference.DIFFUSION, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["condition_projector.projector.weight"]
    tensors["dream_queries"] = tensors["dream_queries"][:3]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        DreamLLM.from_pretrained(tmp_path)
    message = str(raised.value)
    assert "missing: condition_projector.projector.weight [24, 64]" in message
    assert "wrong shape: dream_queries, expected [8, 64], found [3, 64]" in message
