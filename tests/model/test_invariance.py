"""Padding, batch composition and packing change nothing beyond rounding."""

import pytest
import torch

from dreamllm.documents import PLAIN, conversation, interleaved, pair
from dreamllm.documents.batch import pack_batch
from dreamllm.model import DiffusionDraws
from tests.tiny import random_picture, tiny_model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def documents(processor):
    two = interleaved(["A fox.", "And the snow is here."], [(0, random_picture(1)), (1, random_picture(2))])
    dialogue = conversation([("user", "<image>\nWhat?"), ("assistant", "Flour.")], [random_picture(3)], PLAIN)
    creation = pair(random_picture(4), "An hour of the old office", "creation")
    return [processor.encode(d) for d in (two, dialogue, creation)]


def states_by_document(model, processor, encoded, with_null=False):
    batch = processor.pack(encoded, with_null)
    with torch.no_grad():
        states = model.states_packed(batch)
    return states.split(batch.cu_seqlens.diff().tolist())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), (1, 1, 0)])
def test_a_documents_states_do_not_depend_on_its_pack(tiny, order):
    model, processor = tiny
    encoded = documents(processor)
    alone = [states_by_document(model, processor, [document])[0] for document in encoded]
    together = states_by_document(model, processor, [encoded[i] for i in order], with_null=True)
    for i, states in zip(order, together, strict=False):
        torch.testing.assert_close(states, alone[i], **TOLERANCE)


def test_documents_in_a_pack_do_not_see_each_other(tiny):
    """By gradients: one document's states depend on no other document's embeddings."""
    model, processor = tiny
    batch = processor.pack(documents(processor))
    embeddings = []
    hook = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: embeddings.append(kwargs["inputs_embeds"].requires_grad_()), with_kwargs=True
    )
    states = model.states_packed(batch)
    hook.remove()
    first, second = batch.cu_seqlens[1].item(), batch.cu_seqlens[2].item()
    (gradient,) = torch.autograd.grad(states[first:second].square().sum(), embeddings[0])
    assert gradient[0, first:second].abs().sum() > 0
    assert gradient[0, :first].abs().max() == 0
    assert gradient[0, second:].abs().max() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_logits(tiny, side):
    model, processor = tiny
    encoded = documents(processor)
    batch = processor.pad(encoded, side)
    targets = batch.pop("target_pixel_values")
    with torch.no_grad():
        padded = model(**batch).logits
        for row, mask, document in zip(padded, batch["attention_mask"], encoded, strict=True):
            single = processor.pad([document])
            single.pop("target_pixel_values", None)
            torch.testing.assert_close(row[mask.bool()], model(**single).logits[0], **TOLERANCE)
    assert targets.shape[0] == 3


def test_padding_between_prompt_and_queries_matters_only_in_original_compat(tiny):
    """The original right-pads prompts, appends the queries after the padding and counts it as positions."""
    model, processor = tiny
    creation = processor.encode(pair(random_picture(4), "An hour of the old office", "creation"))
    ids, gap = creation.input_ids, creation.dream_starts[0] - 1
    plain = torch.tensor([ids])
    padded = torch.tensor([[*ids[:gap], *[processor.layout.pad] * 6, *ids[gap:]]])
    mask = (padded != processor.layout.pad).long()
    with torch.no_grad():
        alone = model(input_ids=plain).logits[0, gap:]
        ours = model(input_ids=padded, attention_mask=mask).logits[0, gap + 6 :]
        theirs = {}
        model.config.compat = "original"
        try:
            theirs["alone"] = model(input_ids=plain).logits[0, gap:]
            theirs["padded"] = model(input_ids=padded, attention_mask=mask).logits[0, gap + 6 :]
        finally:
            model.config.compat = "default"
    torch.testing.assert_close(ours, alone, **TOLERANCE)
    assert (theirs["padded"] - theirs["alone"]).abs().max() > 1e-3


def test_padded_and_packed_losses_and_gradients_agree(tiny):
    model, processor = tiny
    encoded = documents(processor)
    draws = DiffusionDraws(
        torch.tensor([5, 300, 800]), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    )
    model.set_trainable(
        {"language_model", "embeddings", "lm_head", "visual_projector", "dream_queries", "condition_projector"}
    )
    gradients = []
    for run in (
        lambda: model.forward_packed(processor.pack(encoded), draws=draws),
        lambda: model(**processor.pad(encoded, "left"), draws=draws),
    ):
        model.zero_grad()
        output = run()
        output.loss.backward()
        gradients.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (packed, ours), (padded, theirs) = gradients
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-3, atol=1e-5 * max(1.0, theirs[name].abs().max().item())
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_implementations_give_the_same_states(tiny, attention):
    model, processor = tiny
    encoded = documents(processor)
    packed = states_by_document(model, processor, encoded)
    ours = model.language_model.config._attn_implementation
    model.language_model.set_attn_implementation(attention)
    try:
        assert not model.packs_attention
        grid = states_by_document(model, processor, encoded)
    finally:
        model.language_model.set_attn_implementation(ours)
    for expected, states in zip(packed, grid, strict=True):
        torch.testing.assert_close(states, expected, **TOLERANCE)


def test_cache_and_full_pass_agree(tiny):
    """Token by token over a cache gives the logits of one pass."""
    model, processor = tiny
    batch = processor(["A fox and <image> the snow"], images=[random_picture(7)])
    with torch.no_grad():
        full = model(**batch).logits
        ids, cache, rows = batch["input_ids"], None, []
        split = (ids[0] == processor.layout.im_end).nonzero().item() + 1
        step = model(input_ids=ids[:, :split], pixel_values=batch["pixel_values"], use_cache=True)
        rows.append(step.logits)
        cache = step.past_key_values
        for t in range(split, ids.shape[1]):
            step = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            rows.append(step.logits)
    torch.testing.assert_close(torch.cat(rows, 1), full, **TOLERANCE)


def test_repeated_runs_are_bitwise_equal(tiny):
    model, processor = tiny
    encoded = documents(processor)
    losses = [
        model.forward_packed(processor.pack(encoded), generator=torch.Generator().manual_seed(4)).loss for _ in range(2)
    ]
    assert torch.equal(*losses)


def test_pack_batch_labels_never_cross_documents(tiny):
    _, processor = tiny
    encoded = documents(processor)
    batch = pack_batch(encoded, processor.layout, processor)
    boundaries = set((batch.cu_seqlens[1:] - 1).tolist())
    assert not boundaries & set(batch.loss_positions.tolist())
    assert torch.equal(batch.loss_targets, batch.input_ids[batch.loss_positions + 1])


def test_fused_operators_change_nothing_beyond_rounding(tiny):
    model, processor = tiny
    assert model.operators.replaced
    encoded = documents(processor)
    fused = states_by_document(model, processor, encoded)
    model.use_fused_operators(False)
    assert model.operators is None
    try:
        stock = states_by_document(model, processor, encoded)
    finally:
        model.use_fused_operators()
    assert not all(torch.equal(a, b) for a, b in zip(fused, stock, strict=True))  # other code did run
    for ours, theirs in zip(fused, stock, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_fused_operators_give_the_same_loss_and_gradients(tiny):
    model, processor = tiny
    batch = processor.pack(documents(processor)[1:2])
    parameters = [p for p in model.language_model.parameters() if p.requires_grad]
    results = []
    for fused in (True, False):
        model.use_fused_operators(fused)
        loss = model.forward_packed(batch).lm_loss
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    model.use_fused_operators()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
