"""The latent cache: what a frozen VAE makes of each picture to create, computed once.

Stored are mean and log-variance of the posterior, not a sample: training draws from them with its own generator, the
same numbers as if it had just encoded the picture. A picture is known by its content, wherever it lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from dreamllm.data.latent_files import IDENTITY_FILE, KEY_BYTES, FileHeader, LatentCacheError, LatentIndex, write_whole
from dreamllm.documents import PictureError, PictureSource

Missing = Literal["error", "encode"]
_COMMAND = "dreamllm data encode-latents"


def picture_key(source: PictureSource, mirrored: bool = False) -> bytes:
    """16 bytes that identify a picture by the bytes of its file, or by its pixels, and whether it is mirrored.

    Raises `PictureError` when the file cannot be read.
    """
    hashed = hashlib.blake2b(digest_size=KEY_BYTES, person=b"mirrored" if mirrored else b"")
    if isinstance(source, str | Path):
        try:
            hashed.update(Path(source).read_bytes())
        except FileNotFoundError as error:
            raise PictureError(f"picture {source} does not exist") from error
        except OSError as error:
            raise PictureError(f"picture {source} cannot be read: {error}") from error
    elif isinstance(source, bytes):
        hashed.update(source)
    elif isinstance(source, Image.Image):
        hashed.update(f"{source.mode} {source.size} {source.getexif().get(0x0112, 1)} ".encode() + source.tobytes())
        if source.palette is not None:
            hashed.update(source.palette.tobytes())
    else:
        array = np.ascontiguousarray(source)
        hashed.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return hashed.digest()


@dataclass(frozen=True)
class LatentIdentity:
    """What a cache's moments are of.

    `vae` and `transform` decide the values: see `vae_fingerprint` and `DreamLLMProcessor.describe_target`. `dtype` is
    that of the stored moments, `precision` that of the VAE's computation ("bfloat16": autocast), `mirrored` whether
    the mirrored pictures are there too.
    """

    vae: dict[str, Any]
    transform: dict[str, Any]
    dtype: str
    precision: str
    mirrored: bool

    @staticmethod
    def read(folder: Path) -> LatentIdentity:
        """Raises `LatentCacheError` when `folder` holds no cache."""
        path = folder / IDENTITY_FILE
        try:
            return LatentIdentity(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise LatentCacheError(
                f"{folder} holds no latent cache ({IDENTITY_FILE} is missing); make one with: {_COMMAND} DATA "
                f"--model MODEL --out {folder}"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise LatentCacheError(f"{path} cannot be read: {error}") from error

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        write_whole(folder / IDENTITY_FILE, lambda partial: partial.write_text(text, encoding="utf-8"))

    def differences(self, vae: Mapping[str, Any], transform: Mapping[str, Any]) -> list[str]:
        """What another VAE or transform differs in: "VAE weights: cache 12ab, model 34cd"."""
        return [*_differences("VAE", self.vae, vae), *_differences("transform", self.transform, transform)]


def _differences(what: str, cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {name}: cache {cached.get(name)}, model {wanted.get(name)}"
        for name in sorted(cached.keys() | wanted.keys())
        if cached.get(name) != wanted.get(name)
    ]


class LatentCache:
    """Looks up the posterior moments of pictures. No file stays open; forked processes share the index's memory.

    `vae` and `transform` are those of the model that trains: `vae_fingerprint(model.vae)`, taken as the model was
    loaded, and `processor.describe_target()`. `missing` says what happens to a picture that the cache does not hold:
    an error, or it is encoded while training.

    Raises `LatentCacheError` when `folder` holds no cache, or one of another VAE or transform, naming what differs.
    """

    def __init__(
        self, folder: str | Path, vae: Mapping[str, Any], transform: Mapping[str, Any], missing: Missing = "error"
    ) -> None:
        if missing not in ("error", "encode"):
            raise ValueError(f"missing must be 'error' or 'encode', not {missing!r}")
        self.folder, self.missing = Path(folder), missing
        self.identity = LatentIdentity.read(self.folder)
        different = self.identity.differences(vae, transform)
        if different:
            raise LatentCacheError(
                f"the latent cache {folder} was made for another model:\n  "
                + "\n  ".join(different)
                + f"\nmake one for this model with: {_COMMAND} DATA --model MODEL --out ANOTHER"
            )
        self.index = LatentIndex.open(self.folder)
        self._header = lru_cache(4096)(FileHeader.of)

    def __len__(self) -> int:
        """How many pictures it holds; mirrored ones count."""
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_header"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._header = lru_cache(4096)(FileHeader.of)

    def find(self, source: PictureSource, mirrored: bool = False) -> Tensor | None:
        """Mean and log-variance [2c, h, w] of a picture, or None. Raises `PictureError` for an unreadable file."""
        place = self.index.find(picture_key(source, mirrored))
        if place is None:
            return None
        shard, row = place
        return self._header(self.folder / shard).row("moments", row)

    def not_found(self, name: str) -> LatentCacheError:
        """The error for a picture of the document `name` that is missing."""
        return LatentCacheError(
            f"the latent cache {self.folder} lacks a picture of {name}; add the data's pictures with {_COMMAND}, or "
            'encode what is missing while training (missing="encode")'
        )

    def describe(self) -> dict[str, Any]:
        """What identifies the cache in a run's stored configuration, as JSON values."""
        return {"folder": str(self.folder), "missing": self.missing, **asdict(self.identity)}
