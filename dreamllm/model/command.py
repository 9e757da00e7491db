"""`dreamllm convert` and `dreamllm assemble`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dreamllm.model.assemble import DIFFUSION_MIRRORS, AssembleOptions
from dreamllm.model.assemble import assemble as assemble_model
from dreamllm.model.original import convert_from_original, convert_to_original


def convert(
    out: Path,
    from_original: Path | None = None,
    to_original: Path | None = None,
    clip: str | None = None,
    diffusion: str | None = None,
    compat: Literal["default", "original"] = "default",
    diffusion_mirrors: list[str] | None = None,
) -> None:
    """Converts between the original program's checkpoint layout and ours.

    Args:
        out: folder to write (new or empty).
        from_original: checkpoint of the original program to read.
        to_original: folder of ours to write in the original's layout.
        clip: folder (or hub id) with the CLIP model's configuration; with --from-original.
        diffusion: folder (or hub id) with the Stable Diffusion configurations; with --from-original.
        compat: "original" makes the converted model reproduce the original's defects.
        diffusion_mirrors: hub ids tried in order when the diffusion id cannot be had.
    """
    if (from_original is None) == (to_original is None):
        raise ValueError("give either --from-original DIR or --to-original DIR")
    _require_empty(out)
    if to_original is not None:
        convert_to_original(to_original, out)
    elif from_original is not None:
        if clip is None or diffusion is None:
            raise ValueError(
                "--from-original also needs --clip DIR and --diffusion DIR for the components' configurations"
            )
        mirrors = DIFFUSION_MIRRORS if diffusion_mirrors is None else diffusion_mirrors
        convert_from_original(from_original, clip, diffusion, out, compat, mirrors)
    print(f"wrote {out}")


def assemble(
    out: Path,
    llm: str,
    clip: str,
    diffusion: str,
    options: AssembleOptions = AssembleOptions(),  # noqa: B008 - frozen
) -> None:
    """Makes a stage-I start from a language model, a CLIP model and a Stable Diffusion folder.

    Args:
        out: folder to write (new or empty).
        llm: folder or hub id of a causal language model.
        clip: folder or hub id of a CLIP model.
        diffusion: folder or hub id of a Stable Diffusion model.
        options: what the folders do not say.
    """
    _require_empty(out)
    model, processor = assemble_model(llm, clip, diffusion, options)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters")


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another")
