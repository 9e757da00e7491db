"""optimize(model) for transformers: the same numbers, the same model, and the way back."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dreamkernels import FallbackWarning
from dreamkernels.integrations.transformers import optimize
from dreamkernels.testing import assert_within_eager_error

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, grouped heads, biases, tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "mistral, sliding window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=7)
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start at one and zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def batch(rows: int = 4, length: int = 24) -> dict[str, torch.Tensor]:
    """Right-padded rows; padding is neither attended to nor learned."""
    ids = torch.randint(3, SIZES["vocab_size"], (rows, length))
    mask = torch.ones_like(ids)
    mask[1, length - 5 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy without the places where transformers goes through float32: its norms and its loss."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_norm_in_float64, module)
    exact.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    return exact


def _norm_in_float64(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def loss_and_gradients(model, inputs, autocast=False) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def logits(model, inputs, autocast=False) -> list[torch.Tensor]:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), context:
        return [model(**inputs).logits]


def assert_equal_to_stock(name, dtype, run, training, autocast=False, trials=8):
    """Several trials are stacked: the largest of a few rounding errors is luck, for stock as for ours."""
    results: dict[str, list] = {"ours": [], "stock": [], "exact": []}
    for _ in range(trials):
        model, inputs = make(name, dtype).train(training), batch()
        results["exact"].append(run(in_float64(model), inputs))
        results["stock"].append(run(model, inputs, autocast))
        with optimize(model) as report:
            assert report.replaced
            results["ours"].append(run(model, inputs, autocast))
    for number, what in enumerate(["loss or logits", *(n for n, _ in model.named_parameters())]):
        if number == len(results["exact"][0]):
            break  # logits come alone
        ours, stock, exact = (torch.stack([trial[number] for trial in trials]) for trials in results.values())
        assert_within_eager_error(ours, stock, exact, what=what)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "autocast"],
)
class TestNumbers:
    def test_logits(self, name, dtype, autocast):
        assert_equal_to_stock(name, dtype, logits, training=False, autocast=autocast)

    def test_loss_and_every_gradient(self, name, dtype, autocast):
        assert_equal_to_stock(name, dtype, loss_and_gradients, training=True, autocast=autocast)


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_tokens(name):
    model = make(name).eval()
    inputs = batch(3, 9)
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1)
    del inputs["labels"]
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    optimize(model)
    assert model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist() == stock.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_undo_restores_everything(name):
    model = make(name)
    untouched = make(name)
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    report = optimize(model)
    assert report.replaced
    assert list(model.state_dict()) == keys
    assert not any("forward" in m.__dict__ for m in untouched.modules())
    report.undo()
    assert list(model.state_dict()) == keys
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == before
    report.undo()  # nothing left to do
    optimize(model)  # and it can be optimised again


def test_context_manager_undoes():
    model = make("llama")
    with optimize(model):
        assert "forward" in model.model.norm.__dict__
    assert "forward" not in model.model.norm.__dict__


def test_undo_refuses_when_something_else_wrapped_a_module_since():
    model = make("llama")
    report = optimize(model)
    ours = model.model.norm.forward
    model.model.norm.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"forward of 'model.norm' was replaced again"):
        report.undo()
    assert "forward" in model.model.layers[0].__dict__
    model.model.norm.forward = ours
    report.undo()


def test_optimising_twice_is_an_error():
    model = make("llama")
    optimize(model)
    with pytest.raises(ValueError, match=r"optimised already; call undo"):
        optimize(model)


def test_report_names_what_was_replaced():
    report = optimize(make("qwen2"))
    layer = {"": "residual add in rms_norm", ".self_attn": "rotary", ".mlp": "swiglu"}
    layer |= {".input_layernorm": "rms_norm", ".post_attention_layernorm": "rms_norm"}
    layers = {f"model.layers.{k}{part}": operator for k in range(2) for part, operator in layer.items()}
    assert report.replaced == {"": "linear_cross_entropy", "model.norm": "rms_norm", **layers}
    assert report.left == {}
    lines = str(report).splitlines()
    assert lines[0] == f"replaced: {len(report.replaced)}"
    assert any(line.split() == ["model.layers.*.input_layernorm", "2", "x", "rms_norm"] for line in lines)


def test_report_says_why_modules_were_left():
    class OtherNorm(type(make("llama").model.norm)):
        def forward(self, hidden_states):
            return hidden_states

    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    model.lm_head = torch.nn.Linear(48, 96)
    model.model.norm.double()
    model.model.layers[1].self_attn.k_proj.double()
    model.model.layers[0].input_layernorm.forward = lambda hidden_states: hidden_states
    model.model.layers[1].input_layernorm.__class__ = OtherNorm
    left = optimize(model).left
    assert left["model.norm"] == "weight is torch.float64; the operator takes float32, bfloat16 and float16"
    assert "k_proj.weight is torch.float64" in left["model.layers.1.self_attn"]
    assert "replaced on the instance already" in left["model.layers.0.input_layernorm"]
    assert "OtherNorm overrides the forward of LlamaRMSNorm" in left["model.layers.1.input_layernorm"]
    assert "its activation is gelu" in left["model.layers.0.mlp"]
    assert "lm_head is a Linear with a bias" in left[""]


@pytest.mark.parametrize(
    ("option", "module"),
    [
        ("rms_norm", "model.norm"),
        ("rotary", "model.layers.0.self_attn"),
        ("swiglu", "model.layers.0.mlp"),
        ("linear_cross_entropy", ""),
    ],
)
def test_a_switched_off_operator_is_reported(option, module):
    report = optimize(make("llama"), **{option: False})
    assert report.left[module] == f"{option}=False"
    assert module not in report.replaced
    assert set(report.replaced.values()) - {"residual add in rms_norm"} == {
        "rms_norm",
        "rotary",
        "swiglu",
        "linear_cross_entropy",
    } - {option}


def test_the_attention_can_be_chosen_by_name_and_is_restored():
    model, inputs = make("llama").eval(), batch()
    expected = logits(model, inputs)[0]
    with optimize(model, attention="dreamkernels") as report:
        assert report.replaced["attention"] == "dreamkernels instead of sdpa"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # without padding nothing falls back
            ours = model(inputs["input_ids"]).logits
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(ours, model(inputs["input_ids"]).logits, rtol=1e-4, atol=1e-5)
    with optimize(model, attention="eager") as report:
        assert report.replaced["attention"] == "eager instead of sdpa"
        assert model(**inputs, output_attentions=True).attentions[0].shape == (4, 4, 24, 24)
        torch.testing.assert_close(logits(model, inputs)[0], expected)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="no_such"):
        optimize(model, attention="no_such")
    assert "forward" not in model.model.norm.__dict__  # nothing half done
    with pytest.raises(ValueError, match="needs a transformers model, not ModuleDict"):
        optimize(torch.nn.ModuleDict({"text": model}), attention="eager")


class TestLogits:
    def test_training_with_labels_skips_them_unless_asked(self):
        model, inputs = make("llama").train(), batch()
        stock = model(**inputs)
        optimize(model)
        assert model(**inputs).logits is None
        assert len(model(**inputs, use_cache=False, return_dict=False)) == 1
        kept = model(**inputs, skip_logits=False)
        torch.testing.assert_close(kept.logits, stock.logits)
        torch.testing.assert_close(kept.loss, stock.loss)
        del inputs["labels"]
        torch.testing.assert_close(model(**inputs).logits, stock.logits)

    def test_evaluation_makes_them_unless_told(self):
        model, inputs = make("llama").eval(), batch()
        stock = model(**inputs)
        optimize(model)
        torch.testing.assert_close(model(**inputs).logits, stock.logits)
        skipped = model(**inputs, skip_logits=True)
        assert skipped.logits is None
        torch.testing.assert_close(skipped.loss, stock.loss)
        with pytest.raises(ValueError, match="skip_logits=True needs labels"):
            model(inputs["input_ids"], skip_logits=True)

    def test_the_trainers_arguments_of_the_loss(self):
        model, inputs = make("llama").train(), batch()
        shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        variants = [{"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 7}, {"shift_labels": shifted}]
        stock = [model(**inputs, **extra).loss for extra in variants]
        optimize(model)
        for extra, expected in zip(variants, stock, strict=True):
            torch.testing.assert_close(model(**inputs, **extra).loss, expected)

    def test_a_batch_without_labels_adds_nothing(self):
        model, inputs = make("llama").train(), batch()
        optimize(model)
        inputs["labels"].fill_(-100)
        loss, *gradients = loss_and_gradients(model, inputs)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)

    def test_inspection_sees_the_models_own_arguments(self):
        model = make("llama")
        before = inspect.signature(model.forward)
        optimize(model)
        assert inspect.signature(model.forward) == before

    @pytest.mark.parametrize("change", ["adapter", "hook", "loss"])
    def test_a_head_changed_since_gets_its_logits_with_a_warning(self, change):
        model, inputs = make("llama").train(), batch()
        optimize(model)
        expected = model(**inputs).loss
        if change == "adapter":
            model.lm_head = torch.nn.Sequential(model.lm_head)
            message = "lm_head is a Sequential"
        elif change == "hook":
            model.lm_head.register_forward_hook(lambda module, arguments, output: output)
            message = "lm_head has hooks"
        else:
            original = model.loss_function
            model.loss_function = lambda **arguments: original(**arguments)
            message = "not ForCausalLMLoss"
        with pytest.warns(FallbackWarning, match=message):
            output = model(**inputs)
        assert output.logits is not None
        torch.testing.assert_close(output.loss, expected)


def test_an_unknown_model_is_left_alone():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    report = optimize(model)
    assert not report.replaced
    assert "GPT2LMHeadModel contains no LlamaModel" in report.left[""]
    assert "GPT2LMHeadModel contains no LlamaModel" in str(report)


def test_a_decoder_inside_a_larger_model_is_found():
    outer = torch.nn.ModuleDict({"text": make("llama"), "other": torch.nn.Linear(3, 3)})
    assert "text.model.norm" in optimize(outer).replaced


def test_hooks_on_a_norm_still_run():
    model, inputs = make("llama").eval(), batch()
    expected, seen = logits(model, inputs)[0], []
    optimize(model)
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.append(out))
    torch.testing.assert_close(logits(model, inputs)[0], expected)
    assert [out.shape for out in seen] == [(4, 24, 48)]


def test_a_wrapper_put_around_a_norm_afterwards_still_runs():
    """As accelerate's device hooks do it: the attributes of the wrapped forward are copied."""
    model, inputs, calls = make("llama").eval(), batch(), []
    expected = logits(model, inputs)[0]
    optimize(model)
    norm = model.model.layers[0].post_attention_layernorm
    inner = norm.forward
    norm.forward = functools.update_wrapper(functools.partial(lambda x: calls.append(1) or inner(x)), inner)
    torch.testing.assert_close(logits(model, inputs)[0], expected)
    assert calls == [1]


def test_hidden_states_and_attentions_can_still_be_asked_for():
    model, inputs = make("llama").eval(), batch()
    model.set_attn_implementation("eager")
    stock = model(**inputs, output_hidden_states=True, output_attentions=True)
    optimize(model)
    ours = model(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(ours.hidden_states, stock.hidden_states)
    torch.testing.assert_close(ours.attentions, stock.attentions)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = make("llama").train(), batch()
    optimize(model)
    expected = loss_and_gradients(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = loss_and_gradients(model, inputs)
    assert len(calls) == 2  # once, and once more to recompute
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model(**inputs, use_cache=True).past_key_values is None  # as in stock: nothing is recomputed into a cache


def test_torch_compile_traces_it_whole():
    model, inputs = make("llama").train(), batch()
    optimize(model)
    expected = loss_and_gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = loss_and_gradients(compiled, inputs)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager)


def test_save_and_load(tmp_path):
    model, inputs = make("llama, grouped heads, biases, tied").eval(), batch()
    expected = logits(model, inputs)[0]
    optimize(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded, inputs)[0], expected)
    optimize(loaded)
    torch.testing.assert_close(logits(loaded, inputs)[0], expected)


def test_a_copy_of_an_optimised_model_is_independent():
    model, inputs = make("llama").eval(), batch()
    optimize(model)
    twin = copy.deepcopy(model)
    expected = logits(model, inputs)[0]
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(logits(twin, inputs)[0], expected)


def test_an_unpickled_model_has_its_own_code_and_can_be_optimised_again():
    model, inputs = make("llama").eval(), batch()
    expected = logits(model, inputs)[0]
    optimize(model)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(restored, inputs)[0], expected)
    report = optimize(restored)
    assert report.replaced
    assert not report.left


def test_training_follows_the_same_curve():
    curves = []
    start = make("llama")
    data = [batch() for _ in range(3)]
    for optimised in (False, True):
        model = copy.deepcopy(start).train()
        if optimised:
            optimize(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(30):
            optimizer.zero_grad()
            loss = model(**data[step % 3], use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.8 * curves[0][0]
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-3, atol=0)


def test_without_transformers_the_error_names_the_extra():
    program = "import sys; sys.modules['transformers'] = None\nimport dreamkernels.integrations.transformers"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError: dreamkernels.integrations.transformers needs transformers 5: pip install" in found.stderr
    assert "dreamkernels[dreamllm]" in found.stderr
