"""Filters of readers: samples, and pictures of a document, that are left out although nothing is wrong with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamllm.data.problems import FilteredSampleError
from dreamllm.documents import PictureError, PictureSource, picture_size

LANGUAGE_KEYS = ("LANGUAGE", "language", "lang")
URL_KEYS = ("url", "URL", "raw_url", "image_url")
_URL = re.compile(r"https?://|\bwww\.", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Filters:
    """What a reader leaves out; by default nothing. Each rejection is counted by its reason and is not an error.

    A pair, conversation or instruction is left out whole. Of an interleaved document, pictures that fail
    `min_size`, `min_similarity` or the blacklist lose their place, and the text stays.

    Args:
        min_size: pixels that the width and the height of a picture must both exceed. Read from its header.
        min_similarity: least `matched_sim` of an interleaved document's picture (the paper: 0.25). A picture without
            that field is left out as well.
        min_pictures: least number of pictures an interleaved document must have left.
        languages: accepted languages, compared with the sample's LANGUAGE, language or lang field, ignoring case.
            Samples without such a field are kept.
        min_ascii_share: least share of ASCII letters among the letters of the text, between 0 and 1; text without
            letters counts as 0. It tells scripts apart (Chinese from English), not languages of one script.
        blacklist: a file with one key, URL, or MD5 or SHA-256 of a picture's bytes per line; lines with # are comments.
        blacklisted_words: a file with one word or phrase per line; a text with one of them, as whole words and ignoring
            case, is left out.
        drop_url_captions: leave out texts that contain a web address.
    """

    min_size: int = 0
    min_similarity: float | None = None
    min_pictures: int = 0
    languages: tuple[str, ...] = ()
    min_ascii_share: float = 0.0
    blacklist: Path | None = None
    blacklisted_words: Path | None = None
    drop_url_captions: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.languages, str):
            raise ValueError(f"languages must be a list such as [{self.languages}], not a text")
        if not 0 <= self.min_ascii_share <= 1:
            raise ValueError(f"min_ascii_share must lie between 0 and 1, not {self.min_ascii_share}")
        for name in ("min_size", "min_pictures"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")

    def describe(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as JSON values."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if value != getattr(_NOTHING, name):
                values[name] = str(value) if isinstance(value, Path) else list(value) if name == "languages" else value
        return values


_NOTHING = Filters()


class Screen:
    """Filters with their lists read. Methods raise `FilteredSampleError` for what is to be left out.

    Raises `FileNotFoundError` for a list that does not exist and `ValueError` for one without entries.
    """

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self._languages = {language.casefold() for language in filters.languages}
        self._listed = set() if filters.blacklist is None else set(_lines(filters.blacklist))
        self._hashes = {entry.lower() for entry in self._listed if _HASH.fullmatch(entry.lower())}
        phrases = (
            [] if filters.blacklisted_words is None else [_words(line) for line in _lines(filters.blacklisted_words)]
        )
        self._words = {phrase[0] for phrase in phrases if len(phrase) == 1}
        self._phrases = [f" {' '.join(phrase)} " for phrase in phrases if len(phrase) > 1]

    @cached_property
    def needs_metadata(self) -> bool:
        """Whether the language or a blacklist needs more than text and picture."""
        return bool(self._languages or self._listed)

    @property
    def needs_pictures(self) -> bool:
        """Whether `check_picture` looks at pictures."""
        return bool(self.filters.min_size or self._hashes)

    def check_text(self, text: str, name: str) -> None:
        """Web addresses, words and phrases, script."""
        if self.filters.drop_url_captions and _URL.search(text):
            raise FilteredSampleError("url_caption", f"{name} has a web address in its text")
        if self._words or self._phrases:
            self._check_words(text, name)
        if self.filters.min_ascii_share > 0 and (share := ascii_share(text)) < self.filters.min_ascii_share:
            raise FilteredSampleError("other_language", f"{name}: {share:.0%} of its letters are ASCII letters")

    def _check_words(self, text: str, name: str) -> None:
        words = _words(text)
        found = next((word for word in words if word in self._words), None)
        if found is None and self._phrases:
            joined = f" {' '.join(words)} "
            found = next((phrase.strip() for phrase in self._phrases if phrase in joined), None)
        if found is not None:
            raise FilteredSampleError("blacklisted", f"{name} contains the blacklisted {found!r}")

    def check_metadata(self, values: Mapping[str, Any], name: str) -> None:
        """Language and URL of a sample."""
        if self._languages:
            language = next((str(values[key]) for key in LANGUAGE_KEYS if values.get(key)), None)
            if language is not None and language.casefold() not in self._languages:
                raise FilteredSampleError("other_language", f"{name} is in language {language!r}")
        self.check_urls(values, name)

    def check_urls(self, values: Mapping[str, Any], name: str) -> None:
        """URLs among the fields of a sample or of a picture."""
        self.check_listed((values[key] for key in URL_KEYS if isinstance(values.get(key), str)), name)

    def check_listed(self, identities: Iterable[str], name: str) -> None:
        """Keys, names or URLs against the blacklist."""
        found = next((identity for identity in identities if identity in self._listed), None) if self._listed else None
        if found is not None:
            raise FilteredSampleError("blacklisted", f"{name}: {found} is blacklisted")

    def check_picture(self, source: PictureSource, name: str) -> None:
        """Size, from the header alone, and hash. A header that cannot be read is left to whoever decodes it."""
        least = self.filters.min_size
        if least:
            try:
                width, height = picture_size(source, name)
            except PictureError:
                return
            if min(width, height) <= least:
                raise FilteredSampleError(
                    "small_picture", f"{name}: {width} x {height} pixels, both must exceed {least}"
                )
        if self._hashes:
            self._check_hash(source, name)

    def _check_hash(self, source: PictureSource, name: str) -> None:
        if isinstance(source, str | Path):
            try:
                source = Path(source).read_bytes()
            except OSError:
                return
        if isinstance(source, bytes):
            digests = (hashlib.md5(source, usedforsecurity=False), hashlib.sha256(source))
            if any(digest.hexdigest() in self._hashes for digest in digests):
                raise FilteredSampleError("blacklisted", f"{name}: its picture is blacklisted by its hash")

    def check_similarity(self, value: object, name: str) -> None:
        """`matched_sim` of an interleaved document's picture."""
        least = self.filters.min_similarity
        if least is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FilteredSampleError("low_similarity", f"{name} has no matched_sim")
        if not value >= least:
            raise FilteredSampleError("low_similarity", f"{name} has matched_sim {value:.3f}, below {least}")

    def check_count(self, pictures: int, name: str) -> None:
        if pictures < self.filters.min_pictures:
            raise FilteredSampleError(
                "few_pictures", f"{name} has {pictures} pictures left, fewer than {self.filters.min_pictures}"
            )


def ascii_share(text: str) -> float:
    """Share of ASCII letters among the letters of `text`; 0 without letters."""
    letters = [c for c in text if c.isalpha()]
    return sum(map(str.isascii, letters)) / len(letters) if letters else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"blacklist {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"blacklist {path} is not UTF-8: {error}") from error
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise ValueError(f"blacklist {path} has no entries")
    return entries
