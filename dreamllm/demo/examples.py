"""What the page offers to try: `examples.json` in a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

EXAMPLES_FILE = "examples.json"
PLACES = ("chat", "pictures", "document", "attention")
"""Where on the page; the value of each is a list of texts, in which pictures stand as Markdown with data URLs."""

Examples = dict[str, list[str]]


def read_examples(folder: Path) -> Examples:
    """The examples of a model; none without the file. Raises `ValueError` for a file that holds something else."""
    path = Path(folder) / EXAMPLES_FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object with lists of texts for {', '.join(PLACES)}")
    for place, texts in values.items():
        if place not in PLACES:
            raise ValueError(f"{path} has examples for {place!r}; the page has {', '.join(PLACES)}")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {place} must be a list of texts")
    return values
