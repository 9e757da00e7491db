"""Checkpoints of a stage: what trains, its average if any, the optimiser's moments, and a few numbers.

All else follows from the seed.

<stage>/checkpoints/step-000100/*.distcp, .metadata     torch.distributed.checkpoint's, for any number of processes
                                state.json              step, metrics position, counts, sizes of the other files

A checkpoint is written into `step-000100.partial`, `state.json` last, and renamed by the main process when every
process has written its part. With several nodes the folder must be one that all of them see.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dreamllm.training.distributed import Processes
from dreamllm.training.errors import SaveError
from dreamllm.training.files import PARTIAL, complete_folder, first_line

# Said of every checkpoint of a process that is alone, which is no reason to worry.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
Say = Callable[[str], None]
Save = tuple[int, "Future[None]"]


class StageCheckpoints:
    """The checkpoints of one stage: the newest `keep`, and those of steps that `keep_every` divides.

    `background`: `save` returns when everything is copied to host memory, and a thread writes it.
    """

    def __init__(
        self,
        stage_folder: Path,
        keep: int,
        say: Say,
        processes: Processes,
        keep_every: int | None = None,
        background: bool = True,
    ) -> None:
        self.folder, self.keep, self.say, self.processes = stage_folder / "checkpoints", keep, say, processes
        self.keep_every, self.background = keep_every, background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Save | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def complete(self) -> list[Path]:
        """Checkpoint folders that were renamed into place, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)

    # -- saving ------------------------------------------------------------

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Begins a checkpoint, once the one before is complete; then the oldest beyond `keep` are dropped.

        Raises `SaveError`, for the one before or for this one; older ones stay as they are.
        """
        self.wait()
        writer = dcp.FileSystemWriter(self._partial(step), single_file_per_rank=True, sync_files=True)
        tensors = writer.stage(_tensors(model, optimizer, average))
        self._saving = step, self._thread.submit(self._write, step, writer, tensors, state)
        if not self.background:
            self.wait()

    def check(self) -> None:
        """Raises `SaveError` when the checkpoint that is being written has failed; does not wait for it."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises `SaveError` when that failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
            if self.processes.main:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {step} could not be written to {self.path(step)}: {_cause(error)}. "
                f"{self._intact()} Make room and rerun the same command."
            ) from error

    def close(self) -> None:
        """Lets the thread end, whatever became of its work."""
        self._thread.shutdown(wait=True)

    def _partial(self, step: int) -> Path:
        path = self.path(step)
        return path.with_name(path.name + PARTIAL)

    def _write(self, step: int, writer: dcp.FileSystemWriter, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        partial = self._partial(step)
        dcp.save(tensors, storage_writer=writer, **self._among())
        if self.processes.main:  # comes here when all processes have written
            sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            (partial / STATE).write_text(json.dumps({**state, "step": step, "files": sizes}))
            complete_folder(partial, self.path(step))
            self._drop()

    def _drop(self) -> None:
        passing = [path for path in self.complete() if not self._is_milestone(path)]
        for old in passing[: -self.keep]:
            shutil.rmtree(old)

    def _is_milestone(self, path: Path) -> bool:
        return self.keep_every is not None and int(path.name.rpartition("-")[2]) % self.keep_every == 0

    def _intact(self) -> str:
        complete = self.complete()
        return f"Checkpoint {complete[-1]} is intact." if complete else "There is no earlier checkpoint of this stage."

    def _among(self) -> dict[str, Any]:
        return {"process_group": self.processes.saving} if self.processes.grouped else {"no_dist": True}

    # -- restoring ------------------------------------------------------------

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None = None
    ) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint, of any number of processes, and returns its state; None without one.

        A half-written or damaged one is passed over with a message.
        """
        candidates = self.processes.on_main(self._candidates)
        for path, state in candidates:
            _allocate_moments(optimizer)
            try:
                dcp.load(_tensors(model, optimizer, average), storage_reader=_Reader(path), **self._among())
            except (dcp.api.CheckpointException, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
                self.say(f"ignoring the damaged checkpoint {path}: {_cause(error)}")
                continue
            self.say(f"resuming after step {state['step']} from {path}")
            return state
        if candidates:
            raise SaveError(f"no checkpoint in {self.folder} can be read; remove the folder to begin the stage anew")
        return None

    def _candidates(self) -> list[tuple[Path, dict[str, Any]]]:
        """The checkpoints whose files are as long as they should be, newest first."""
        for path in self.folder.glob(f"step-*{PARTIAL}"):
            self.say(f"ignoring the half-written checkpoint {path}")
            shutil.rmtree(path, ignore_errors=True)  # now, while no process is writing
        states = [(path, self._whole(path)) for path in reversed(self.complete())]
        return [(path, state) for path, state in states if state is not None]

    def _whole(self, path: Path) -> dict[str, Any] | None:
        """The state of a checkpoint, or None when a file of it is not as long as it was."""
        try:
            state = json.loads((path / STATE).read_text())
            for name, size in state["files"].items():
                found = (path / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
        except (OSError, ValueError, KeyError) as error:
            self.say(f"ignoring the damaged checkpoint {path}: {error}")
            return None
        return state

    def remove(self) -> None:
        """Removes all but those to keep for good: the stage is complete."""
        self.wait()
        if not self.processes.main:
            return
        for path in self.folder.glob("step-*"):
            if path.suffix == PARTIAL or not self._is_milestone(path):
                shutil.rmtree(path, ignore_errors=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None) -> dict[str, Any]:
    """The trained parameters, their moments and their average by name, as they are: sharded ones stay so."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in trained.items()}
    own = {"model": {name: parameter.detach() for name, parameter in trained.items()}, "optimizer": moments}
    return own if average is None else {**own, "average": dict(average)}


def _allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Gives AdamW the state that it makes at its first step, for a checkpoint to be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()


class _Reader(dcp.FileSystemReader):
    """Reads the index of a checkpoint without running what it might contain: only the classes that it consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _OTHERS = (("torch", "Size"), ("torch.serialization", "_get_layout"))

    def find_class(self, module: str, name: str) -> Any:
        if name == "PosixPath" and module.startswith("pathlib"):
            return Path
        if (module, name) in self._OTHERS or module in self._MODULES or module == "torch":
            found = super().find_class(module, name)
            own_class = isinstance(found, type) and found.__module__ == module
            if (module, name) in self._OTHERS or isinstance(found, torch.dtype) or (module != "torch" and own_class):
                return found
        raise pickle.UnpicklingError(f"the checkpoint's index contains {module}.{name}, which has no place there")


def _cause(error: BaseException) -> str:
    """What went wrong in the process where it did."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return first_line(next(iter(error.failures.values()))[0])
    return first_line(error)
