"""Finding model folders: a local folder first, else hub repositories in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

WEIGHT_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


class FolderNotFound(FileNotFoundError):  # noqa: N818 - named after its parent
    """None of the places named holds the folder. The message lists each with the reason."""


def resolve_folder(source: str | Path, mirrors: Sequence[str] = ()) -> Path:
    """Returns a local folder for `source`: itself if it is a folder, else a downloaded hub repository.

    `mirrors` are hub ids tried in order after `source`. Raises `FolderNotFound` that says what was tried and why each
    failed.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or str(source).startswith((".", "~")):
        raise FolderNotFound(f"folder {source} does not exist")
    failures = []
    for candidate in (str(source), *mirrors):
        folder, reason = _download(candidate)
        if folder is not None:
            return folder
        failures.append(f"  {candidate}: {reason}")
    raise FolderNotFound(
        f"{source} is not a local folder, and no hub repository could be fetched:\n"
        + "\n".join(failures)
        + "\nDownload the files yourself and give the folder, or name a mirror."
    )


def _download(repository: str) -> tuple[Path | None, str]:
    try:
        patterns = [*WEIGHT_PATTERNS, *(f"*/{pattern}" for pattern in WEIGHT_PATTERNS)]
        return Path(snapshot_download(repository, allow_patterns=patterns)), ""
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__
