"""What the processes of `tests/generation/test_prompt_files.py` do."""

import os
import signal

from dreamllm.evaluation import records
from dreamllm.generation.command import generate


def answer(folder, prompts, out):
    generate(folder, prompts=prompts, out=out, batch_size=2, max_new_tokens=4)


def answer_until_killed(folder, prompts, out, groups):
    """Is killed while it writes the group after `groups` whole ones."""
    written = []

    def write_text(path, text):
        if len(written) == groups:
            path.with_name(f"{path.name}.{os.getpid()}.partial").write_text(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        whole(path, text)

    whole, records.write_text = records.write_text, write_text
    answer(folder, prompts, out)
