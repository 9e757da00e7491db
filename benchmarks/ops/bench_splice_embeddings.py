"""splice_embeddings against the loop of concatenations of multimodal models, and masked indexing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.harness import Case, cost_per_call_us
from dreamkernels import splice_embeddings
from dreamkernels.ops.operator import OPERATORS
from dreamkernels.ops.splice_embeddings.reference import splice_embeddings as gather

DOCUMENTS, PICTURES, FEATURES_PER_PICTURE, QUERIES = 16, 40, 64, 64

FAMILY = "language"
SHAPES = {"small": (512,), "working": (4096,)}  # widths


def layout(width_of_text: int = 100, seed: int = 0) -> tuple[list[list[tuple[int, int, int]]], torch.Tensor]:
    """Pieces (start, length, first source row or -1) of each document, and the same as an index.

    40 pictures over 16 documents; after every other picture the 64 dream queries.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, DOCUMENTS, (PICTURES,), generator=generator).sort().values.tolist()
    documents: list[list[tuple[int, int, int]]] = []
    position = 0
    for document in range(DOCUMENTS):
        pieces = []
        for picture in [k for k, owner in enumerate(owners) if owner == document]:
            pieces += [(width_of_text, -1), (FEATURES_PER_PICTURE, picture * FEATURES_PER_PICTURE)]
            if picture % 2:
                pieces.append((QUERIES, PICTURES * FEATURES_PER_PICTURE))
        pieces.append((width_of_text, -1))
        placed = []
        for length, row in pieces:
            placed.append((position, length, row))
            position += length
        documents.append(placed)
    index = torch.full((position,), -1, dtype=torch.int32)
    for start, length, row in (piece for pieces in documents for piece in pieces):
        if row >= 0:
            index[start : start + length] = torch.arange(row, row + length, dtype=torch.int32)
    return documents, index


def concatenating(documents: list[list[tuple[int, int, int]]]) -> Callable[..., torch.Tensor]:
    pictures = PICTURES * FEATURES_PER_PICTURE

    def run(tokens: torch.Tensor, features: torch.Tensor, queries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        finished = []
        for pieces in documents:
            document = tokens[:0]
            for start, length, row in pieces:
                if row < 0:
                    piece = tokens[start : start + length]
                else:
                    piece = queries if row >= pictures else features[row : row + length]
                document = torch.cat([document, piece])
            finished.append(document)
        return torch.cat(finished)

    return run


def ours(tokens: torch.Tensor, features: torch.Tensor, queries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return splice_embeddings(tokens, [features, queries], index)


def gathering(tokens: torch.Tensor, features: torch.Tensor, queries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return gather(tokens, [features, queries], index)


def with_backward(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(
        tokens: torch.Tensor, features: torch.Tensor, queries: torch.Tensor, index: torch.Tensor, grad: torch.Tensor
    ) -> Any:
        out = forward(tokens, features, queries, index)
        return out, *torch.autograd.grad(out, (tokens, features, queries), grad)

    return run


def cases(device: str, size: str) -> Iterator[Case]:
    documents, index = layout()
    index = index.to(device)
    length = len(index)
    for width in SHAPES[size]:
        for dtype in (torch.bfloat16, torch.float32):
            torch._dynamo.reset()
            forwards = {
                "ours": ours,
                "concatenations": concatenating(documents),
                "masked gather": gathering,
                "torch.compile": torch.compile(gathering, dynamic=False),
            }
            name = f"{str(dtype).removeprefix('torch.')} [{length}, {width}]"

            def plain(width=width, dtype=dtype) -> Sequence[torch.Tensor]:
                rows = (length, PICTURES * FEATURES_PER_PICTURE, QUERIES)
                return [*(torch.randn(count, width, device=device).to(dtype) for count in rows), index]

            def differentiable(plain=plain) -> Sequence[torch.Tensor]:
                *tensors, index = plain()
                return [*(t.requires_grad_() for t in tensors), index, torch.randn_like(tensors[0])]

            row_bytes = width * dtype.itemsize
            forward_bytes = 2 * length * row_bytes
            # bfloat16 sums of twenty query rows differ in order and rounding
            tolerance = 1e-5 if dtype == torch.float32 else 5e-2
            yield Case("splice_embeddings", f"forward {name}", plain, forwards, forward_bytes, 0, 0.0, device)
            replaced = int((index >= 0).sum())
            backward_bytes = (2 * length + PICTURES * FEATURES_PER_PICTURE + QUERIES) * row_bytes
            both = {contender: with_backward(call) for contender, call in forwards.items()}
            yield Case(
                "splice_embeddings",
                f"forward+backward {name}",
                differentiable,
                both,
                forward_bytes + backward_bytes,
                replaced * width,
                tolerance,
                device,
            )


def boundary(device: str) -> dict[str, float]:
    """Microseconds per call on a [4, 8] tensor with one source."""
    tokens, source = torch.randn(4, 8, device=device), torch.randn(2, 8, device=device)
    index = torch.tensor([-1, 0, 1, -1], device=device)
    operator = OPERATORS["splice_embeddings"].overloads["inference"]
    return {
        "splice_embeddings": cost_per_call_us(splice_embeddings, (tokens, [source], index)),
        "splice_embeddings, operator alone": cost_per_call_us(operator, (tokens, [source], index)),
        "masked gather": cost_per_call_us(gather, (tokens, [source], index)),
    }
