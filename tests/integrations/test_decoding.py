"""The decoder over the cache computes what transformers' decoder computes."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

from dreamkernels import GraphedCalls, decode_layers
from dreamkernels.integrations.decoding import CachedDecoder
from dreamkernels.integrations.transformers import optimize
from tests.support.graphs import rerunning

SHAPE = dict(  # noqa: C408
    vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=512, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, biased, scaled positions": LlamaConfig(
        **SHAPE, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "qwen2": Qwen2Config(**SHAPE),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=9),
}  # fmt: skip


def build(config, dtype=torch.float32, fused=True, trained=False, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype).requires_grad_(trained)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if fused:
        optimize(model)
    return model


@torch.no_grad()
def expected(model, embeds):
    return model.get_decoder()(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]


def pieces_of(*lengths, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, SHAPE["hidden_size"], generator=generator).to(dtype) for n in lengths]


ROUNDS = [(7, 1, 140), (1, 1, 1), (5, 5, 5), (1, 3, 130), (1, 1, 2), (129, 129, 129), (1, 1, 1)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("build_options", [{}, {"fused": False}, {"trained": True}], ids=["", "stock", "trained"])
def test_pieces_of_any_lengths(config, build_options):
    """Single positions, equal and unequal pieces, short and longer than decode_attention takes, each row on its own."""
    model = build(config, **build_options)
    decoder = CachedDecoder(model.get_decoder(), 512)
    cache = decoder.new_cache()
    sequences = [cache.new() for _ in range(3)]
    seen = [torch.zeros(0, SHAPE["hidden_size"])] * 3
    for number, counts in enumerate(ROUNDS):
        pieces = pieces_of(*counts, seed=number)
        states = decoder.advance(cache, sequences, counts, torch.cat(pieces)).split(counts)
        seen = [torch.cat(pair) for pair in zip(seen, pieces, strict=True)]
        for got, whole in zip(states, seen, strict=True):
            torch.testing.assert_close(got, expected(model, whole)[-len(got) :], rtol=2e-4, atol=2e-4)


def test_bfloat16_is_as_exact_as_transformers():
    model = build(CONFIGS["llama"], torch.bfloat16)
    truth = build(CONFIGS["llama"], fused=False)
    truth.load_state_dict(model.state_dict())
    truth = truth.double()
    decoder = CachedDecoder(model.get_decoder(), 512)
    errors = {"ours": 0.0, "theirs": 0.0}
    for seed in range(5):
        cache = decoder.new_cache()
        (piece,) = pieces_of(40, dtype=torch.bfloat16, seed=seed)
        sequence, counts = cache.new(), [30, 1, 9]
        ours = [decoder.advance(cache, [sequence], [len(part)], part) for part in piece.split(counts)]
        exact = expected(truth, piece.double())
        for name, states in (("ours", torch.cat(ours)), ("theirs", expected(model, piece))):
            errors[name] = max(errors[name], (states.double() - exact).abs().max().item())
    assert errors["ours"] <= 2 * errors["theirs"]


@pytest.fixture
def fused_calls(monkeypatch):
    """Rows of every call of the operator that runs a whole decoder."""
    calls = []

    def counting(x, *arguments, **options):
        calls.append(len(x))
        return decode_layers(x, *arguments, **options)

    monkeypatch.setattr("dreamkernels.integrations.fused_decoding.decode_layers", counting)
    return calls


def one_by_one(model, positions=4):
    """States after as many single positions."""
    decoder = CachedDecoder(model.get_decoder(), 512, head=model.get_output_embeddings())
    cache = decoder.new_cache()
    sequence = cache.new()
    (piece,) = pieces_of(positions, dtype=model.dtype)
    return torch.cat([decoder.advance(cache, [sequence], [1], row[None]) for row in piece])


@pytest.mark.parametrize("trained", [False, True])
def test_single_positions_run_as_one_operator(fused_calls, trained):
    model = build(CONFIGS["llama"], trained=trained)
    one_by_one(model)
    assert fused_calls == [1] * 4


@pytest.mark.parametrize(
    "spoil",
    {
        "biases": lambda: build(CONFIGS["qwen2"]),
        "stock modules": lambda: build(CONFIGS["llama"], fused=False),
        "a hook": lambda: hooked(build(CONFIGS["llama"]), lambda model: model.model.layers[1].mlp.up_proj),
        "a hook on a norm": lambda: hooked(build(CONFIGS["llama"]), lambda model: model.model.norm),
        "another weight": lambda: replaced(build(CONFIGS["llama"])),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_the_operator_does_not_know_runs_layer_by_layer(fused_calls, spoil):
    model = spoil[1]()
    torch.testing.assert_close(one_by_one(model), expected(model, *pieces_of(4)), rtol=2e-4, atol=2e-4)
    assert not fused_calls


def hooked(model, module_of):
    module_of(model).register_forward_hook(lambda module, args, output: 1.5 * output)
    return model


def replaced(model):
    """A weight of a kind whose memory is not the matrix."""

    class Quantised(torch.nn.Parameter):
        pass

    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = Quantised(projection.weight.detach(), requires_grad=False)
    assert type(projection.weight) is Quantised
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_position_does_not_depend_on_what_else_runs_by_a_bit(dtype):
    model = build(CONFIGS["llama"], dtype)
    decoder = CachedDecoder(model.get_decoder(), 512, head=model.get_output_embeddings())
    tails = pieces_of(6, 6, 6, dtype=dtype, seed=3)
    prompts = pieces_of(5, 40, 17, dtype=dtype, seed=4)

    def run(rows, others):
        cache = decoder.new_cache()
        sequences = [cache.new() for _ in rows]
        for sequence, row in zip(sequences, rows, strict=True):  # prompts apart: of them the length decides the way
            decoder.advance(cache, [sequence], [len(prompts[row])], prompts[row])
        found = []
        for i in range(6):
            embeds = [torch.stack([tails[row][i] for row in rows]), *(prompts[:1] * others)]
            more = [cache.new() for _ in range(others)]
            counts = [1] * len(rows) + [len(prompts[0])] * others
            states = decoder.advance(cache, [*sequences, *more], counts, torch.cat(embeds))[: len(rows)]
            found.append(torch.cat([states, decoder.logits(states)], dim=1))
        return torch.stack(found, dim=1)

    together = run([0, 1, 2], others=2)
    for row in range(3):
        assert torch.equal(run([row], others=0)[0], together[row])


@pytest.mark.parametrize("max_pages", [None, 40])
def test_captured_passes_give_the_same_states(max_pages):
    """Sequences come, grow over pages and go; rows that fill up a batch disturb nobody."""
    model = build(CONFIGS["llama"], fused=False)
    captures: list[int] = []
    plain = CachedDecoder(model.get_decoder(), 512)
    captured = CachedDecoder(model.get_decoder(), 512, graphs=GraphedCalls(capture=rerunning(captures)))
    caches = [decoder.new_cache(max_pages) for decoder in (plain, captured)]
    assert caches[1].max_pages == (None if max_pages is None else 41)
    sequences = [[cache.new() for _ in range(5)] for cache in caches]
    for number, rows in enumerate([(0,), (0, 1), (0, 1, 2), (2, 0), (0, 1, 2, 3, 4), *[(4, 2, 1)] * 140]):
        (embeds,) = pieces_of(len(rows), seed=number)
        states = [
            decoder.advance(cache, [own[row] for row in rows], [1] * len(rows), embeds)
            for decoder, cache, own in zip((plain, captured), caches, sequences, strict=True)
        ]
        torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)
    # One, two, four, eight sequences of up to 8 pages; then four of up to 16.
    assert captures == [1, 2, 4, 8, 4]
    for cache, own in zip(caches, sequences, strict=True):
        for sequence in own:
            cache.release(sequence)
        assert cache.pages_in_use == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_passes_on_a_gpu_give_the_same_states(dtype):
    model = build(CONFIGS["llama"], dtype).to("cuda")
    plain, captured = (CachedDecoder(model.get_decoder(), 512, graphs=g) for g in (None, GraphedCalls()))
    caches = [decoder.new_cache() for decoder in (plain, captured)]
    sequences = [[cache.new() for _ in range(3)] for cache in caches]
    for number in range(40):
        (embeds,) = pieces_of(3, dtype=dtype, seed=number)
        states = [
            decoder.advance(cache, own, [1] * 3, embeds.to("cuda"))
            for decoder, cache, own in zip((plain, captured), caches, sequences, strict=True)
        ]
        torch.testing.assert_close(states[1], states[0])


def test_forks_of_a_prompt_equal_prompts_of_their_own():
    model = build(CONFIGS["llama"])
    decoder = CachedDecoder(model.get_decoder(), 512)
    cache = decoder.new_cache()
    prompt, *tails = pieces_of(21, 3, 3, 3)
    origin = cache.new()
    decoder.advance(cache, [origin], [21], prompt)
    forks = [cache.fork(origin) for _ in tails]
    states = [decoder.advance(cache, forks, [1] * 3, torch.stack([tail[i] for tail in tails])) for i in range(3)]
    for row, tail in enumerate(tails):
        whole = expected(model, torch.cat([prompt, tail]))[-3:]
        torch.testing.assert_close(torch.stack([s[row] for s in states]), whole, rtol=2e-4, atol=2e-4)


def test_only_wanted_states_are_returned():
    model = build(CONFIGS["llama"])
    decoder = CachedDecoder(model.get_decoder(), 512)
    pieces = pieces_of(4, 6)
    everything, some = [
        decoder.advance(cache, [cache.new(), cache.new()], [4, 6], torch.cat(pieces), wanted)
        for wanted in (None, torch.tensor([3, 9, 5]))
        for cache in [decoder.new_cache()]
    ]
    torch.testing.assert_close(some, everything[[3, 9, 5]], rtol=1e-5, atol=1e-5)


def test_changed_weights_are_noticed():
    model = build(CONFIGS["llama"])
    decoder = CachedDecoder(model.get_decoder(), 512)
    (piece,) = pieces_of(9)

    def run():
        cache = decoder.new_cache()
        return decoder.advance(cache, [cache.new()], [9], piece)

    before = run()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
        model.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    after = run()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected(model, piece), rtol=2e-4, atol=2e-4)


def test_hooks_on_projections_run():
    model = build(CONFIGS["llama"])
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    decoder = CachedDecoder(model.get_decoder(), 512)
    cache = decoder.new_cache()
    decoder.advance(cache, [cache.new()], [2], pieces_of(2)[0])
    assert seen == [1]
    model.get_decoder().layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: seen.append(2))
    decoder.advance(cache, [cache.new()], [2], pieces_of(2)[0])
    assert seen == [1, 1, 2]


def test_a_model_keeps_its_decoder_while_it_fits():
    model = build(CONFIGS["llama"])
    first = CachedDecoder.of(model.get_decoder(), 512)
    assert CachedDecoder.of(model.get_decoder(), 512) is first
    assert CachedDecoder.of(model.get_decoder(), 512, pack_weights=False) is not first
    model.requires_grad_(True)
    assert CachedDecoder.of(model.get_decoder(), 512) is not first


def test_a_kept_decoder_ends_with_its_model():
    model = build(CONFIGS["llama"])
    reference = weakref.ref(CachedDecoder.of(model.get_decoder(), 512))
    assert reference() is not None
    copy.deepcopy(model)
    del model
    gc.collect()
    assert reference() is None


def test_other_layouts_are_refused():
    shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    with pytest.raises(ValueError, match="GPTNeoXModel cannot be decoded here: GPTNeoXModel has no norm"):
        CachedDecoder(build(GPTNeoXConfig(**shape), fused=False).get_decoder(), 512)
    dynamic = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="rotary embedding 'dynamic' depends on the length"):
        CachedDecoder(build(dynamic).get_decoder(), 512)
    with pytest.raises(ValueError, match="its activation is gelu, not silu"):
        CachedDecoder(build(LlamaConfig(**SHAPE, hidden_act="gelu")).get_decoder(), 512)
