"""Reading and checking weight files: safetensors, or pickles with `weights_only=True`; single or sharded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
DIFFUSERS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is missing, mis-shaped or unreadable, by name."""


def read_file(path: Path) -> dict[str, Tensor]:
    """Reads one weight file onto the CPU. Nothing is unpickled beyond tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    except Exception as error:  # the unpickler's own error type is private
        raise CheckpointError(f"{path} cannot be read without running its code, which is refused: {error}") from error


def read_folder(folder: Path, names: Iterable[str] = (SAFETENSORS, PICKLE)) -> dict[str, Tensor]:
    """Reads the weights of a folder, the first of `names` that is there, whole or as `<name>.index.json` shards."""
    names = tuple(names)
    for name in names:
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: tensor for shard in shards for key, tensor in read_file(folder / shard).items()}
    raise CheckpointError(f"{folder} has no weights; looked for {', '.join(names)} and their sharded forms")


def load_into(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str, ignore: tuple[str, ...] = ()
) -> None:
    """Copies `tensors` into `module` by name, all or nothing.

    Raises `CheckpointError` naming every missing and every mis-shaped tensor (expected and found shape) and every
    unexpected one. Tensors whose name ends with one of `ignore` may be present or absent.
    """
    own = module.state_dict()
    check_tensors({name: tuple(t.shape) for name, t in own.items()}, tensors, source, ignore)
    module.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], source: str, ignore: tuple[str, ...] = ()
) -> None:
    """Raises `CheckpointError` unless `found` holds exactly the tensors of `expected`, in their shapes."""
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [
        f"wrong shape: {name}, expected {list(shape)}, found {list(found[name].shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    problems += [
        f"unexpected: {name}" for name in found if name not in expected and not name.endswith(ignore or ("\0",))
    ]
    problems = [p for p in problems if not (p.startswith("missing") and p.split()[1].endswith(ignore or ("\0",)))]
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(shown))
