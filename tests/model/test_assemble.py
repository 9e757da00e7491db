"""From component folders to a model, and one folder for everything."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, LlamaForCausalLM

from dreamllm.model import AssembleOptions, CheckpointError, DreamLLM, DreamLLMConfig, DreamLLMProcessor, assemble
from dreamllm.model.folders import FolderNotFound, resolve_folder
from tests.tiny import HIDDEN, NUM_QUERIES, VOCAB_SIZE, random_picture, tiny_model, write_components


def test_special_tokens_extend_the_vocabulary_and_keep_the_old_rows(tmp_path):
    model, processor = tiny_model(tmp_path)
    llm = LlamaForCausalLM.from_pretrained(tmp_path / "llm")
    rows = model.get_input_embeddings().weight
    assert rows.shape == (VOCAB_SIZE + 8, HIDDEN)
    assert torch.equal(rows[:VOCAB_SIZE], llm.get_input_embeddings().weight)
    assert rows[VOCAB_SIZE:].std().item() == pytest.approx(0.02, rel=0.3)
    assert sorted(processor.tokenizer.get_vocab()[t] for t in ("[PAD]", "<im_start>", "<dream_end>"))[0] == VOCAB_SIZE


def test_ids_come_from_the_tokenizer(tmp_path):
    model, processor = tiny_model(tmp_path)
    vocabulary = processor.tokenizer.get_vocab()
    assert model.layout.dream_start == vocabulary["<dream_start>"]
    assert model.layout == processor.layout
    assert model.config.eos_token_id == processor.tokenizer.eos_token_id == 2


def test_same_seed_same_weights(tmp_path):
    first, _ = tiny_model(tmp_path / "a", seed=3)
    second, _ = tiny_model(tmp_path / "b", seed=3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("vae", [False, True])
def test_one_sharded_folder_restores_model_and_processor(tmp_path, vae):
    model, processor = tiny_model(tmp_path / "parts", vae=vae)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    processor.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert isinstance(config, DreamLLMConfig)
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, DreamLLM)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    again = AutoProcessor.from_pretrained(tmp_path / "model")
    assert isinstance(again, DreamLLMProcessor)
    assert again.layout == processor.layout
    text = "A photo, of</s> the  license"
    assert again.encode_text(text) == processor.encode_text(text)
    picture = random_picture(1, 24)
    assert torch.equal(again.vision([picture]), processor.vision([picture]))


def test_loaded_model_computes_the_same(tmp_path):
    model, processor = tiny_model(tmp_path / "parts")
    model.save_pretrained(tmp_path / "model")
    loaded = DreamLLM.from_pretrained(tmp_path / "model")
    batch = processor(["What is <image>?"], images=[random_picture(0)])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_mlp_projectors_have_their_depth(tmp_path):
    components = write_components(tmp_path)
    options = AssembleOptions(visual_projector="mlp", visual_projector_depth=2, num_dream_queries=NUM_QUERIES)
    model, _ = assemble(*components, options)
    linear = [m for m in model.visual_projector.modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(HIDDEN, 16), (HIDDEN, HIDDEN)]
    assert all(m.bias is None for m in model.condition_projector.modules() if isinstance(m, torch.nn.Linear))


def test_bfloat16_is_honoured(tmp_path):
    components = write_components(tmp_path)
    model, _ = assemble(*components, AssembleOptions(dtype="bfloat16", num_dream_queries=NUM_QUERIES))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("missing", ["diffusion/unet/config.json", "diffusion/model_index.json", "clip/config.json"])
def test_missing_component_file_is_named(tmp_path, missing):
    components = write_components(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.split("/")[-1].replace(".", r"\.")):
        assemble(*components, AssembleOptions(num_dream_queries=NUM_QUERIES))


def test_wrong_kind_of_component_is_named(tmp_path):
    llm, _, diffusion = write_components(tmp_path)
    with pytest.raises(CheckpointError, match="holds a 'llama' model; a CLIP"):
        assemble(llm, llm, diffusion, AssembleOptions(num_dream_queries=NUM_QUERIES))


def test_unknown_folder_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FolderNotFound, match="does not exist"):
        resolve_folder(tmp_path / "nothing")

    tried = []

    def no_network(repo, **_):
        tried.append(repo)
        raise OSError(f"no network for {repo}")

    monkeypatch.setattr("dreamllm.model.folders.snapshot_download", no_network)
    with pytest.raises(FolderNotFound) as raised:
        resolve_folder("first/model", mirrors=("second/model",))
    assert tried == ["first/model", "second/model"]
    assert "first/model: no network" in str(raised.value)
    assert "second/model: no network" in str(raised.value)


def test_mirror_is_used_when_the_first_source_is_gone(tmp_path, monkeypatch):
    def only_mirror(repo, **_):
        if repo == "gone/model":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setattr("dreamllm.model.folders.snapshot_download", only_mirror)
    assert resolve_folder("gone/model", mirrors=("mirror/model",)) == tmp_path


def test_config_survives_json(tmp_path):
    model, _ = tiny_model(tmp_path)
    values = json.loads(model.config.to_json_string())
    again = DreamLLMConfig.from_dict(values)
    assert again.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_scale_schedule", "l3_norm"),
        ("compat", "openai"),
        ("condition_dropout", 1.0),
        ("num_dream_queries", 0),
        ("visual_projector", "conv"),
        ("visual_projector_depth", 2),
    ],
)
def test_impossible_settings_are_errors(tmp_path, field, value):
    model, _ = tiny_model(tmp_path)
    with pytest.raises(ValueError, match=field.removesuffix("_depth")):
        DreamLLMConfig(**{**model.config.to_dict(), field: value})
