"""`dreamllm merge`."""

from __future__ import annotations

from pathlib import Path

from dreamllm.training.merge import merge_stage1


def merge(out: Path, comprehension: Path, creation: Path) -> None:
    """Joins the two halves of stage I, trained apart, to one model.

    Args:
        out: folder to write (new or empty).
        comprehension: model folder of the half that trained the visual projector.
        creation: model folder of the half that trained the dream queries and the condition projector.
    """
    merge_stage1(comprehension, creation, out)
    print(f"wrote {out}")
