"""The last layer computes only the positions whose states are read, and those are what they were."""

import pytest
import torch

from dreamllm.documents import interleaved, pair
from tests.tiny import random_picture, tiny_model

TRAINED = {"language_model", "embeddings", "lm_head", "visual_projector", "dream_queries", "condition_projector"}


@pytest.fixture
def tiny(tmp_path):
    model, processor = tiny_model(tmp_path)
    model.set_trainable(TRAINED)
    story = interleaved(["A fox.", "The snow.", "The end."], [(0, random_picture(1)), (1, random_picture(2))])
    documents = [story, pair(random_picture(3), "Flour and a license", "comprehension")]
    return model.train(), processor.pack([processor.encode(document) for document in documents])


def rows_of_layers(model, batch):
    """Rows through the MLP of each layer in one forward pass."""
    rows = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
        for layer in model.decoder.layers
    ]
    model.forward_packed(batch)
    for hook in hooks:
        hook.remove()
    return rows


def test_the_last_layer_computes_what_is_read(tiny):
    model, batch = tiny
    read = batch.loss_positions.numel() + batch.dream_positions.numel()
    assert read < batch.num_tokens
    assert rows_of_layers(model, batch) == [batch.num_tokens, read]
    model.use_fused_operators(False)
    assert rows_of_layers(model, batch) == [batch.num_tokens] * 2


@pytest.mark.parametrize("attention", ["dreamkernels", "sdpa"])
def test_states_of_some_rows_are_those_of_all(tiny, attention):
    model, batch = tiny
    model.language_model.set_attn_implementation(attention)
    rows = torch.tensor([3, 0, 3, batch.num_tokens - 1])
    torch.testing.assert_close(model.states_packed(batch, rows), model.states_packed(batch)[rows], rtol=1e-5, atol=1e-6)
    assert model.states_packed(batch, rows[:0]).shape == (0, model.config.hidden_size)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_gradients_are_those_of_all_rows(tiny, recompute):
    model, batch = tiny

    def run():
        model.zero_grad()
        loss = model.forward_packed(batch, torch.Generator().manual_seed(3)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    model.use_less_memory(recompute, None)
    ours = run()
    model.use_fused_operators(False)
    model.use_less_memory("none", None)
    for mine, theirs in zip(ours, run(), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
