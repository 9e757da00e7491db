"""Answers to a file of prompts: by any number of processes, resumed after a kill, always to the same bytes.

Lines are answered in groups of consecutive ones, whatever the number of processes, and a group is written whole or not
at all. So every answer is computed in the same company, and what a killed run left is complete or made anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dreamllm.documents import Picture, Text
from dreamllm.evaluation.records import complete_lines, write_records
from dreamllm.evaluation.run import fingerprint
from dreamllm.generation.asked import Asked
from dreamllm.generation.lines import Line
from dreamllm.inference import Answer, Assistant, Request
from dreamllm.training import claim_folder, locked, make_folder

RUN_FILE, ANSWERS_FILE = "run.json", "answers.jsonl"
GROUPS_FOLDER, PICTURES_FOLDER = "groups", "pictures"


@dataclass(frozen=True)
class Launched:
    """This process among those that torchrun started; alone without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @staticmethod
    def of_environment() -> Launched:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return Launched(*(int(os.environ[name]) for name in names)) if "RANK" in os.environ else Launched()

    def device(self, wanted: str) -> str:
        """Where this process computes: with "cuda" on a GPU of its own. Raises `ValueError` where there is none."""
        if wanted != "cuda" or self.world == 1:
            return wanted
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local process {self.local_rank} has no GPU of its own: there are {torch.cuda.device_count()}; start "
                "as many processes per node as it has GPUs"
            )
        return f"cuda:{self.local_rank}"


@dataclass(frozen=True)
class Run:
    """The answers to `lines`, in groups of `batch_size`, in folder `out`.

    `keep_going`: a line that cannot be answered is recorded, instead of ending the run.
    """

    lines: Sequence[Line]
    out: Path
    batch_size: int
    keep_going: bool

    def groups(self) -> list[Sequence[Line]]:
        return [self.lines[i : i + self.batch_size] for i in range(0, len(self.lines), self.batch_size)]

    def group_file(self, number: int) -> Path:
        return self.out / GROUPS_FOLDER / f"{number:06d}.jsonl"

    def done(self) -> int:
        """How many lines are answered."""
        return sum(len(group) for i, group in enumerate(self.groups()) if self.group_file(i).is_file())

    def claim(
        self, prompts: Path, model: Path, defaults: Asked, dtype: str, int8_weights: bool, say: Callable[[str], None]
    ) -> None:
        """Makes the folder this run's, or checks that it is. Raises `ConfigurationChangedError` naming what differs."""
        for folder in (self.out, self.out / GROUPS_FOLDER, self.out / PICTURES_FOLDER):
            make_folder(folder)
        configuration = {
            "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
            "model": fingerprint(model),
            "dtype": dtype,
            "int8_weights": int8_weights,
            "batch_size": self.batch_size,
            "keep_going": self.keep_going,
            "options": {**asdict(defaults), "images": None},
        }
        with locked(self.out):  # processes may begin at the same moment
            claim_folder(self.out / RUN_FILE, configuration, say=say)

    def work(self, load: Callable[[], Assistant], launched: Launched, progress: Callable[[int], None]) -> None:
        """Answers this process's share of the groups that are not answered yet; loads no model where there is none.

        Raises `ValueError` that names the line which cannot be answered, unless `keep_going`.
        """
        assistant: Assistant | None = None
        for number, group in enumerate(self.groups()):
            if number % launched.world != launched.rank or self.group_file(number).is_file():
                continue
            assistant = assistant or load()
            write_records(self.group_file(number), self._answer(group, assistant))
            progress(self.done())

    def finish(self) -> bool:
        """Writes all answers into one file if all are there; whether they are."""
        files = [self.group_file(number) for number in range(len(self.groups()))]
        if not all(path.is_file() for path in files):
            return False
        with locked(self.out):
            write_records(self.out / ANSWERS_FILE, [record for path in files for record in complete_lines(path)])
            for partial in (self.out / GROUPS_FOLDER).glob("*.partial"):  # of a process that was killed
                partial.unlink(missing_ok=True)
        return True

    def _answer(self, group: Sequence[Line], assistant: Assistant) -> list[dict[str, Any]]:
        engine = assistant.engine
        submitted: list[tuple[Line, Request | ValueError]] = []
        try:
            submitted.extend((line, self._submitted(line, assistant)) for line in group)
            while engine.step():
                pass
            return [self._record(line, request) for line, request in submitted]
        finally:
            for _, request in submitted:
                if isinstance(request, Request) and not request.done:
                    request.cancel()
            engine.step()  # which lets go of what was cancelled

    def _submitted(self, line: Line, assistant: Assistant) -> Request | ValueError:
        if line.asked is None:
            return ValueError(line.problem)
        try:
            prompt, options = line.asked.prompt_and_options(assistant)
            return assistant.engine.submit(prompt, options)
        except ValueError as error:
            return self._problem(line, error)

    def _problem(self, line: Line, error: ValueError) -> ValueError:
        if not self.keep_going:
            raise ValueError(f"line {line.number}: {error} (--keep-going answers the others)") from error
        return error

    def _record(self, line: Line, request: Request | ValueError) -> dict[str, Any]:
        own = {"line": line.number} | ({} if line.asked is None or line.asked.id is None else {"id": line.asked.id})
        if isinstance(request, Request):
            try:
                assert line.asked is not None
                return (
                    own | {"prompt": line.asked.prompt, "seed": line.asked.seed} | self._written(line, request.answer)
                )
            except ValueError as error:
                request = self._problem(line, error)
        return own | {"error": str(request)}

    def _written(self, line: Line, answer: Answer) -> dict[str, Any]:
        """The answer as JSON, its pictures written."""
        parts: list[dict[str, str]] = []
        pictures = iter(answer.pictures)
        for part in answer.document.parts:
            if isinstance(part, Text):
                parts.append({"text": part.text})
            elif isinstance(part, Picture):
                name = f"{PICTURES_FOLDER}/{line.number:06d}-{sum('picture' in p for p in parts) + 1}.png"
                next(pictures).save(self.out / name)
                parts.append({"picture": name})
        return {"text": answer.text, "parts": parts, "stopped": answer.stopped, "tokens": len(answer.token_ids)}
