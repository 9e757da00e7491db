"""Checkpoints of a stage: what trains, the optimiser, and a few numbers. Everything else is a function of the seed.

<stage>/checkpoints/step-000100/weights.safetensors     trainable parameters by name
                                optimizer.pt            AdamW's state, loaded with weights_only=True
                                state.json              step, metrics position, counts, sizes of the other files
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dreamllm.training.errors import SaveError
from dreamllm.training.files import PARTIAL, write_folder

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.pt", "state.json"
Say = Callable[[str], None]


class StageCheckpoints:
    """The checkpoints of one stage, at most `keep` of them."""

    def __init__(self, stage_folder: Path, keep: int, say: Say) -> None:
        self.folder, self.keep, self.say = stage_folder / "checkpoints", keep, say

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def complete(self) -> list[Path]:
        """Checkpoint folders that were renamed into place, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Writes a checkpoint, then drops the oldest beyond `keep`. Raises `SaveError`; older ones stay as they are."""

        def fill(folder: Path) -> None:
            save_file(_trainable(model), folder / WEIGHTS)
            torch.save(optimizer.state_dict(), folder / OPTIMIZER)
            sizes = {name: (folder / name).stat().st_size for name in (WEIGHTS, OPTIMIZER)}
            (folder / STATE).write_text(json.dumps({**state, "step": step, "files": sizes}))

        try:
            write_folder(self.path(step), fill, f"the checkpoint of step {step}")
        except SaveError as error:
            raise SaveError(f"{error}. {self._intact()} Make room and rerun the same command.") from error
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)

    def _intact(self) -> str:
        complete = self.complete()
        return f"Checkpoint {complete[-1]} is intact." if complete else "There is no earlier checkpoint of this stage."

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint and returns its state; None when there is none.

        A half-written or damaged one is passed over with a message.
        """
        for path in self.folder.glob(f"step-*{PARTIAL}"):
            self.say(f"ignoring the half-written checkpoint {path}")
        for path in reversed(self.complete()):
            loaded = self._load(path)
            if loaded is None:
                continue
            weights, optimizer_state, state = loaded
            model.load_state_dict(weights, strict=False)
            optimizer.load_state_dict(optimizer_state)
            self.say(f"resuming after step {state['step']} from {path}")
            return state
        return None

    def _load(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]] | None:
        try:
            state = json.loads((path / STATE).read_text())
            for name, size in state["files"].items():
                found = (path / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            return load_file(path / WEIGHTS), torch.load(path / OPTIMIZER, weights_only=True), state
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            self.say(f"ignoring the damaged checkpoint {path}: {error}")
            return None

    def remove(self) -> None:
        """Removes all: the stage is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
