"""Bounds of what oneDNN keeps in a process that meets ever new shapes.

oneDNN compiles a primitive for every shape, such as the rows of all prompts that are read together, and keeps the
latest 1,024; torch keeps the descriptions of as many beside them. A product's primitive takes 0.27 MB, its description
as much again, so a server's memory would grow for hours, by 0.5 GB. A primitive that is needed again takes 0.1 to
0.3 ms to make, a description next to nothing while its primitive is kept.
"""

from __future__ import annotations

import os

KEPT_PRIMITIVES = 256
KEPT_DESCRIPTIONS = 64

_BOUNDS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": KEPT_PRIMITIVES, "LRU_CACHE_CAPACITY": KEPT_DESCRIPTIONS}


def bound_onednn_caches() -> None:
    """Lets oneDNN and torch keep so many primitives and descriptions, unless the environment says how many.

    Both read their bounds when they make the first primitive of a process: to be called before.
    """
    for name, bound in _BOUNDS.items():
        os.environ.setdefault(name, str(bound))
