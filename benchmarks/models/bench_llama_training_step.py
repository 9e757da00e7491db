"""A training step of a small LLaMA from transformers: stock, compiled, and with `optimize()`.

Forward under bfloat16 autocast, backward, AdamW with float32 weights: what `dreamllm train` does with
`--settings.precision bfloat16`. Every contender has its own model, from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case
from dreamkernels.integrations.transformers import optimize

FAMILY = "models"


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
        )


# Working: LLaMA-7B's layers, four of its 32, since four contenders train in one process.
SHAPES = {
    "small": Shape(4, 512, 256, 688, 4, 4, 8192),
    "working": Shape(4, 2048, 4096, 11008, 4, 32, 32008),
}


def make_model(shape: Shape, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config()).to(device).train()


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


def optimised(shape: Shape, device: str) -> LlamaForCausalLM:
    model = make_model(shape, device)
    optimize(model, attention="dreamkernels")
    return model


def cases(device: str, size: str) -> Iterator[Case]:
    torch._dynamo.reset()
    shape = SHAPES[size]
    model = make_model(shape, device)
    parameters = sum(p.numel() for p in model.parameters())
    multiplied = parameters - model.get_input_embeddings().weight.numel()
    tokens = shape.batch * shape.length
    attention = 6 * shape.layers * tokens * shape.length * shape.hidden  # causal: half of 12
    yield Case(
        "llama_training_step",
        f"hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocabulary}, "
        f"{shape.batch} x {shape.length} tokens, bfloat16 autocast",
        lambda: [torch.randint(0, shape.vocabulary, (shape.batch, shape.length), device=device)],
        {
            "optimize()": make_step(optimised(shape, device), device),
            "eager": make_step(model, device),
            "torch.compile": make_step(make_model(shape, device), device, compile=True),
            "optimize() + torch.compile": make_step(optimised(shape, device), device, compile=True),
        },
        bytes_moved=7 * 4 * parameters,  # AdamW reads weight, gradient and two moments, and writes all but the gradient
        flops=6 * multiplied * tokens + attention,
        relative_tolerance=1e-2,
        device=device,
    )


def boundary(device: str) -> dict[str, float]:
    return {}
