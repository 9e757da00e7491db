"""API keys: who may use the server."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

MIN_KEY_LENGTH = 16


class ApiKeys:
    """The keys that are accepted. Only their SHA-256 sums are kept."""

    def __init__(self, keys: list[str]) -> None:
        if not keys:
            raise ValueError("no API key was given")
        for key in keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"an API key must have at least {MIN_KEY_LENGTH} visible ASCII characters; one has {len(key)}"
                )
        self._sums = [_sum(key) for key in keys]

    @staticmethod
    def read(path: Path) -> ApiKeys:
        """One key per line; empty lines and those beginning with # are passed over."""
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        try:
            return ApiKeys([line for line in lines if line and not line.startswith("#")])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def accept(self, authorization: str) -> bool:
        """Whether the header `Bearer KEY` carries a key. Takes as long for any wrong key of one length."""
        scheme, _, key = authorization.partition(" ")
        given = _sum(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._sums]  # all of them, whichever fits
        return scheme.lower() == "bearer" and any(matches)


def _sum(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
