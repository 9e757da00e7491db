"""What `dreamllm demo` offers to try with a model of the digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dreamllm.demo.examples import EXAMPLES_FILE, Examples
from dreamllm.evaluation.digits_scans import Scans
from dreamllm.inference.page import data_uri
from dreamllm.recipes.digits.data import NEXT, READING, counting_request
from dreamllm.training.files import write_json


def write_examples(model: Path, scans: Scans) -> None:
    """Writes requests in words and with scans into a model's folder."""

    def scan(number: int) -> str:
        picture = np.asarray(scans.pictures[scans.of(number)[0]])
        return f"![scan]({data_uri(Image.fromarray(picture))})"

    examples: Examples = {
        "chat": [
            counting_request(2, 5),
            "Draw a seven.",
            f"{scan(4)}{READING[0][0]}",
            f"{scan(2)}{scan(3)}{NEXT[0]}",
        ],
        "pictures": ["a handwritten eight", "the digit three", "a picture of a five"],
        "document": ["two", f"{scan(3)}{scan(4)}"],
        "attention": ["a handwritten eight", f"{scan(3)}{scan(4)}five"],
    }
    write_json(model / EXAMPLES_FILE, examples)
