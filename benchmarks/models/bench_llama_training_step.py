"""A training step of a small LLaMA from transformers: stock, compiled, and with `optimize()`.

Forward under bfloat16 autocast, backward, AdamW with float32 weights: what `dreamllm train` does with
`--settings.precision bfloat16`. Every contender has its own model, from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case
from dreamkernels.integrations.transformers import optimize

FAMILY = "language"
BATCH, LENGTH = 4, 512
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": LENGTH,
}


def make_model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device).train()


def make_step(model: LlamaForCausalLM, device: str, compile: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    called = torch.compile(model, dynamic=False) if compile else model

    def step(ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = called(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss

    return step


def optimised(device: str) -> LlamaForCausalLM:
    model = make_model(device)
    optimize(model, attention="dreamkernels")
    return model


def cases(device: str) -> Iterator[Case]:
    torch._dynamo.reset()
    model = make_model(device)
    parameters = sum(p.numel() for p in model.parameters())
    multiplied = parameters - model.get_input_embeddings().weight.numel()
    tokens = BATCH * LENGTH
    attention = 6 * CONFIG["num_hidden_layers"] * tokens * LENGTH * CONFIG["hidden_size"]  # causal: half of 12
    yield Case(
        "llama_training_step",
        f"hidden {CONFIG['hidden_size']}, {CONFIG['num_hidden_layers']} layers, vocabulary {CONFIG['vocab_size']}, "
        f"{BATCH} x {LENGTH} tokens, bfloat16 autocast",
        lambda: [torch.randint(0, CONFIG["vocab_size"], (BATCH, LENGTH), device=device)],
        {
            "optimize()": make_step(optimised(device), device),
            "eager": make_step(model, device),
            "torch.compile": make_step(make_model(device), device, compile=True),
            "optimize() + torch.compile": make_step(optimised(device), device, compile=True),
        },
        bytes_moved=7 * 4 * parameters,  # AdamW reads weight, gradient and two moments, and writes all but the gradient
        flops=6 * multiplied * tokens + attention,
        relative_tolerance=1e-2,
        device=device,
    )


def boundary(device: str) -> dict[str, float]:
    return {}
