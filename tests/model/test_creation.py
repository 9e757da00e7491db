"""Creation with a frozen language model: only the dream queries run with autograd, and nothing else changes."""

import contextlib
from collections import Counter
from functools import partial

import pytest
import torch

from dreamkernels.integrations import transformers_attention
from dreamkernels.ops.attention import reference
from dreamllm.documents import PLAIN, conversation, interleaved, pair
from dreamllm.model import modeling
from dreamllm.model.creation import CreationSplit, dependent_states
from tests.tiny import NUM_QUERIES, random_picture, tiny_model

JOINTS = {"dream_queries", "condition_projector"}


@pytest.fixture
def tiny(tmp_path):
    model, processor = tiny_model(tmp_path, loss_weight_lm=0.0)
    model.set_trainable(JOINTS)
    return model.train(), processor


def kinds():
    story = interleaved(
        ["A fox.", "And the snow is here.", "The end."], [(0, random_picture(1)), (1, random_picture(2))]
    )
    order = conversation(
        [("user", "<image>\nWhat?"), ("assistant", "An hour. <dream>")], [random_picture(3), random_picture(4)], PLAIN
    )
    return {
        "pairs": [pair(random_picture(i), "the license " * (i + 1), "creation") for i in range(3)],
        "interleaved": [story, pair(random_picture(5), "snow", "creation")],
        "with input pictures": [order, story],
        "with documents that draw nothing": [pair(random_picture(6), "Flour", "comprehension"), story],
    }


def packed(processor, kind="pairs", with_null=False):
    return processor.pack([processor.encode(document) for document in kinds()[kind]], with_null)


def gradients(model, batch, autocast=False, seed=3):
    """The loss and the gradients of what is trained."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.forward_packed(batch, torch.Generator().manual_seed(seed))
    output.loss.backward()
    return [output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@contextlib.contextmanager
def plain_way(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "why_not_split", lambda model, batch: "the test wants the plain way")
        yield


# -- equal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_null", [False, True])
@pytest.mark.parametrize("kind", list(kinds()))
def test_loss_and_gradients_are_those_of_the_plain_way(tiny, monkeypatch, kind, with_null):
    model, processor = tiny
    model.config.condition_dropout = 0.5 if with_null else 0.0
    batch = packed(processor, kind, with_null)
    assert model.why_not_split(batch) == ""
    ours = gradients(model, batch)
    with plain_way(monkeypatch):
        expected = gradients(model, batch)
    assert all(each.norm() > 0 for each in expected)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_other_code_and_recomputation_change_nothing(tiny, monkeypatch, fused, recompute):
    model, processor = tiny
    batch = packed(processor, "interleaved")
    with plain_way(monkeypatch):
        expected = gradients(model, batch)
    model.use_fused_operators(fused)
    model.use_less_memory(recompute, None)
    for mine, theirs in zip(gradients(model, batch), expected, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def states_gradient(model, batch, split):
    """The gradient of a weighted sum of the states at the dream queries, with respect to these."""
    weights = torch.randn(*batch.dream_positions.shape, model.config.hidden_size, generator=torch.manual_seed(4))
    if split:
        layout = CreationSplit.of(batch)
        rows = layout.row_of[batch.dream_positions]
        states = dependent_states(model, batch, layout, rows.flatten()).unflatten(0, rows.shape)
    else:
        states = model.states_packed(batch)[batch.dream_positions]
    (gradient,) = torch.autograd.grad((states * weights.to(states.dtype)).sum(), model.dream_queries)
    return states.detach(), gradient


def float64(model, monkeypatch):
    """The model with transformers' own code in float64, with the attention's reference."""

    def attention(q, k, v, cu_q=None, cu_k=None, *_, causal=True, scale, constant_kv_prefix=0, **options):
        prefix = constant_kv_prefix if isinstance(constant_kv_prefix, torch.Tensor) else None
        return reference.attention(q, k, v, cu_q, cu_k, prefix, causal, scale, -1, 0.0)[0]

    monkeypatch.setattr(transformers_attention, "attention", attention)
    monkeypatch.setattr(transformers_attention, "FLOAT_DTYPES", (torch.float64,))
    model.use_fused_operators(False)
    monkeypatch.setattr(modeling, "splice_embeddings", spliced)
    return model.double()


def spliced(tokens, sources, index):
    rows = torch.cat(sources)[index.clamp(min=0)]
    return torch.where((index >= 0)[:, None], rows, tokens)


@pytest.mark.parametrize("kind", list(kinds()))
def test_states_and_gradients_in_float64(tiny, monkeypatch, kind):
    model, processor = tiny
    batch = packed(processor, kind, with_null=True)
    float64(model, monkeypatch)
    if batch.pixel_values is not None:
        batch.pixel_values = batch.pixel_values.double()
    for mine, theirs in zip(states_gradient(model, batch, True), states_gradient(model, batch, False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_is_that_of_the_plain_way(tiny, monkeypatch, autocast):
    model, processor = tiny
    batch = packed(processor, "interleaved")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = (states_gradient(model, batch, split) for split in (True, False))
    truth = states_gradient(float64(model, monkeypatch), batch, False)
    for mine, theirs, exact in zip(ours, plain, truth, strict=True):
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm()


def test_without_gradients_the_loss_is_the_same(tiny, monkeypatch):
    model, processor = tiny
    batch = packed(processor)
    with plain_way(monkeypatch):
        expected = gradients(model, batch)[0]
    with torch.no_grad():
        loss = model.forward_packed(batch, torch.Generator().manual_seed(3)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_only_the_condition_projector_may_train(tiny, monkeypatch):
    model, processor = tiny
    model.set_trainable({"condition_projector"})
    batch = packed(processor)
    ours = gradients(model, batch)
    with plain_way(monkeypatch):
        expected = gradients(model, batch)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


# -- less work ---------------------------------------------------------------------------------------------------------


def test_only_positions_of_queries_run_with_autograd(tiny):
    """Rows through the MLP of each layer, with and without autograd, and through the head."""
    model, processor = tiny
    batch = packed(processor)
    rows = Counter()

    def watch(name, module, args, output):
        rows[name, output.requires_grad] += output.shape[1]

    for number, layer in enumerate(model.decoder.layers):
        layer.mlp.down_proj.register_forward_hook(partial(watch, number))
    model.get_output_embeddings().register_forward_hook(partial(watch, "head"))
    gradients(model, batch)
    before = sum(first - start for start, first, _ in batch.query_spans)
    queries = batch.dream_positions.numel()
    assert before + queries < batch.num_tokens
    # Of the constants the last layer gives keys and values only.
    assert rows == {(0, False): before, (0, True): queries, (1, True): queries}


def test_documents_that_draw_nothing_do_not_run(tiny):
    _, processor = tiny
    batch = packed(processor, "with documents that draw nothing")
    split = CreationSplit.of(batch)
    story = batch.cu_seqlens[1].item()
    assert split.both.positions.min() == story
    assert split.both.positions.max() == batch.dream_positions.max()


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "trained", "expected"),
    [
        ("pairs", JOINTS | {"language_model"}, "parameters of the language model are trained"),
        ("pairs", JOINTS | {"embeddings"}, "parameters of the language model are trained"),
        ("pairs", JOINTS | {"lm_head"}, ""),
        ("pairs", JOINTS | {"visual_projector"}, ""),
        ("interleaved", JOINTS | {"visual_projector"}, "input pictures and the visual projector is trained"),
        ("interleaved", JOINTS | {"vision_model"}, "input pictures and the vision model is trained"),
    ],
)
def test_what_is_trained_decides(tiny, kind, trained, expected):
    model, processor = tiny
    model.set_trainable(trained)
    reason = model.why_not_split(packed(processor, kind))
    assert expected in reason
    assert bool(expected) == bool(reason)


def test_the_language_loss_decides(tiny):
    model, processor = tiny
    model.config.loss_weight_lm = 0.5
    batch = packed(processor, "interleaved")
    assert model.why_not_split(batch) == "the language loss counts (loss_weight_lm is 0.5)"
    assert model.forward_packed(batch).lm_loss > 0


def test_a_language_loss_of_weight_zero_is_not_computed(tiny, monkeypatch):
    model, processor = tiny
    batch = packed(processor, "interleaved")
    assert batch.loss_targets.numel()
    assert model.forward_packed(batch).lm_loss is None
    with plain_way(monkeypatch):
        assert model.forward_packed(batch).lm_loss is None


def test_the_attention_decides(tiny):
    model, processor = tiny
    model.language_model.set_attn_implementation("sdpa")
    assert model.why_not_split(packed(processor)) == "the attention is sdpa, not dreamkernels"


def test_a_batch_without_queries_has_nothing_to_split(tiny):
    model, processor = tiny
    batch = processor.pack([processor.encode(pair(random_picture(1), "Flour", "comprehension"))])
    assert batch.query_spans == ()
    assert model.why_not_split(batch) == "the batch has no dream queries"


@pytest.mark.parametrize("with_null", [False, True])
def test_query_spans_reach_from_the_first_to_the_last_query(tiny, with_null):
    _, processor = tiny
    encoded = [processor.encode(document) for document in kinds()["with documents that draw nothing"]]
    batch = processor.pack(encoded, with_null)
    bounds = batch.cu_seqlens.tolist()
    first, *_, last = encoded[1].dream_starts
    expected = [(bounds[1], bounds[1] + first, bounds[1] + last + NUM_QUERIES)]
    if with_null:
        expected.append((bounds[2], bounds[2] + 2, bounds[2] + 2 + NUM_QUERIES))
    assert batch.query_spans == tuple(expected)


def test_a_prefix_without_packed_sequences_is_an_error(tiny):
    model, _ = tiny
    rows = torch.zeros(1, dtype=torch.long)
    prefix = transformers_attention.ConstantPrefix(rows, rows, rows.int(), last_layer=1)
    embeds = torch.zeros(1, 3, model.config.hidden_size)
    with pytest.raises(ValueError, match="belongs to packed sequences"):
        model.decoder(inputs_embeds=embeds, constant_prefix=prefix)
