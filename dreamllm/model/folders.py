"""Finding model folders: a local folder first, else hub repositories in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

WEIGHT_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


class FolderNotFound(FileNotFoundError):
    """None of the places named holds the folder. The message lists each with the reason."""


def resolve_folder(source: str | Path, mirrors: Sequence[str] = (), subfolder: str | None = None) -> Path:
    """Returns a local folder for `source`: itself if it is a folder, else a downloaded hub repository.

    `mirrors` are hub ids tried in order after `source`. `subfolder` restricts the download. Raises `FolderNotFound`
    that says what was tried and why each failed.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or str(source).startswith((".", "~")):
        raise FolderNotFound(f"folder {source} does not exist")
    failures = []
    for candidate in (str(source), *mirrors):
        try:
            patterns = [f"{subfolder}/{p}" for p in WEIGHT_PATTERNS] if subfolder else list(WEIGHT_PATTERNS)
            return Path(snapshot_download(candidate, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
            failures.append(f"  {candidate}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    raise FolderNotFound(
        f"{source} is not a local folder, and no hub repository could be fetched:\n"
        + "\n".join(failures)
        + "\nDownload the files yourself and give the folder, or name a mirror."
    )
