"""Inputs of the splice_embeddings tests."""

import torch

# positions, width, rows of each source
CASES = (
    (0, 8, ()),
    (5, 3, ()),
    (1, 1, (1,)),
    (7, 5, (0,)),
    (40, 17, (4, 0, 3)),
    (300, 64, (120, 16)),
    (33, 257, (1, 2, 3, 4, 5, 6)),  # more sources than one launch of the GPU kernel takes
)


def inputs(length, width, rows, dtype, device="cpu", index_dtype=torch.int64):
    """Token embeddings, sources and a random index in which about a third of the positions keep their token."""
    tokens = torch.randn(length, width, device=device).to(dtype).requires_grad_()
    sources = [torch.randn(count, width, device=device).to(dtype).requires_grad_() for count in rows]
    total = sum(rows)
    index = torch.randint(-1, total, (length,), device=device) if total else torch.full((length,), -1, device=device)
    index[torch.rand(length, device=device) < 0.3] = -1
    return tokens, sources, index.to(index_dtype)
