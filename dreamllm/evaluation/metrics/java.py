"""METEOR and SPICE, by the Java programs that pycocoevalcap ships. What is not installed is said, never scored."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dreamllm.evaluation.metrics.captions import CaptionScores, check_captions

try:
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice
except ImportError:  # comes with the extra `eval`
    Meteor = Spice = None

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class MetricUnavailableError(ImportError):
    """A metric whose program is not installed. The message says what is missing."""


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """METEOR 1.5 (Denkowski and Lavie 2014) of tokenised texts.

    Raises `MetricUnavailableError` without pycocoevalcap or Java, and `ValueError` as `cider_d`.
    """
    _need_java()
    check_captions(candidates, references)
    corpus, each = Meteor().compute_score(*_numbered(candidates, references))
    return CaptionScores(float(corpus), tuple(map(float, each)))


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """SPICE (Anderson et al. 2016) of tokenised texts.

    Raises `MetricUnavailableError` without pycocoevalcap, Java or the parser's models, which are never fetched from
    here; `ValueError` as `cider_d`.
    """
    _need_java()
    folder = spice_folder()
    missing = [name for name in SPICE_MODELS if not (folder / name).is_file()]
    if missing:
        raise MetricUnavailableError(
            f"its models {' and '.join(missing)} are not in {folder.name}/ of pycocoevalcap.spice"
        )
    check_captions(candidates, references)
    corpus, each = Spice().compute_score(*_numbered(candidates, references))
    return CaptionScores(float(corpus), tuple(float(score["All"]["f"]) for score in each))


def spice_folder() -> Path:
    """Where SPICE looks for its models."""
    found = find_spec("pycocoevalcap.spice")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "lib"


def _need_java() -> None:
    if Meteor is None:
        raise MetricUnavailableError("pycocoevalcap is not installed")
    if shutil.which("java") is None:
        raise MetricUnavailableError("the program java is not installed")


def _numbered(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    return dict(enumerate(map(list, references))), {i: [text] for i, text in enumerate(candidates)}
