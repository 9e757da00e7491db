"""Data converted into tars: image-text pairs, or interleaved documents, in shards that can be resumed and verified."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from dreamllm.data.interleaved import InterleavedReader, group_documents
from dreamllm.data.pairs import Pairs
from dreamllm.data.preparation import picture_reason
from dreamllm.data.problems import BadSampleError, Problem, ProblemLog, Reason
from dreamllm.data.reader import Reader
from dreamllm.data.tar_scan import Damage, walk
from dreamllm.data.tars import group_pairs
from dreamllm.documents import PictureError, PictureSource, load_picture

Member = tuple[str, bytes]
MANIFEST = "build.json"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class BuildSettings:
    """How shards are made.

    Args:
        samples_per_shard: samples of the source per tar, usable or not.
        max_side: pictures with a longer side, in pixels, are made smaller and stored as JPEG; others keep their bytes.
        quality: of the JPEG files that are made, 1 to 95.
    """

    samples_per_shard: int = 1000
    max_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side must be at least 1 pixel, not {self.max_side}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality must lie between 1 and 95, not {self.quality}")


class BuildError(ValueError):
    """A build that cannot go on in its folder, or whose result is not what was written."""


@dataclass(frozen=True)
class _Job:
    reader: Reader
    out: Path
    settings: BuildSettings
    digits: int

    @property
    def shards(self) -> int:
        return -(-len(self.reader) // self.settings.samples_per_shard)

    def tar(self, shard: int) -> Path:
        return self.out / f"{shard:0{self.digits}d}.tar"

    def record(self, shard: int) -> Path:
        return self.out / f"{shard:0{self.digits}d}.build.json"

    def indices(self, shard: int) -> range:
        size = self.settings.samples_per_shard
        return range(shard * size, min((shard + 1) * size, len(self.reader)))


def build(
    reader: Reader,
    out: Path,
    settings: BuildSettings,
    processes: int = 1,
    step: Callable[[], None] = lambda: None,
) -> ProblemLog:
    """Writes the documents of `reader`, pairs or interleaved, into `out` as `00000.tar`, `00001.tar` and so on.

    A shard holds a fixed range of the source and is written beside its place and renamed, so an interrupted build goes
    on where it stopped and its result does not depend on that. Samples that cannot be used are left out and counted.
    At the end every shard is read again and compared with what was written. `step` is called per shard, twice.

    Raises `BuildError` when `out` holds another build, or a shard is not what was written; `OSError` when it cannot be
    written.
    """
    if not isinstance(reader, Pairs | InterleavedReader):
        raise ValueError(f"{reader.name} holds {type(reader).__name__}; only pairs and interleaved documents are built")
    job = _Job(reader, out, settings, 5)
    job = _Job(reader, out, settings, max(5, len(str(job.shards - 1))))
    _claim(job)
    missing = [shard for shard in range(job.shards) if not _is_whole(job, shard)]
    for _ in range(job.shards - len(missing)):
        step()
    for _ in _written(job, missing, processes):
        step()
    log = ProblemLog(max_bad_fraction=1.0)
    for shard in range(job.shards):
        record = json.loads(job.record(shard).read_text())
        _verify(job, shard, record)
        log.add(record["samples"], [Problem(p["reason"], p["message"]) for p in record["problems"]])
        step()
    return log


def _claim(job: _Job) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    manifest = job.out / MANIFEST
    now = json.loads(json.dumps({"source": job.reader.describe(), "settings": asdict(job.settings)}))
    if manifest.is_file():
        then = json.loads(manifest.read_text())
        if then != now:
            raise BuildError(f"{job.out} holds another build ({manifest}: {then}, now {now}); choose another folder")
        return
    if any(job.out.iterdir()):
        raise BuildError(f"{job.out} is not an empty folder")
    _write(manifest, json.dumps(now, indent=2).encode() + b"\n")


def _written(job: _Job, shards: list[int], processes: int) -> Iterator[None]:
    if processes == 1 or len(shards) < 2:
        for shard in shards:
            _write_shard(job, shard)
            yield
        return
    with ProcessPoolExecutor(processes, initializer=_begin, initargs=(job,)) as pool:
        try:
            for future in as_completed([pool.submit(_write_shard_here, shard) for shard in shards]):
                future.result()
                yield
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_here: list[_Job] = []


def _begin(job: _Job) -> None:
    _here[:] = [job]


def _write_shard_here(shard: int) -> None:
    _write_shard(_here[0], shard)


def _write_shard(job: _Job, shard: int) -> None:
    """Writes the tar, then the record of what is in it, which marks it as whole."""
    path = job.tar(shard)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    problems: list[Problem] = []
    samples = 0
    try:
        with open(partial, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for index in job.indices(shard):
                    try:
                        members = _members(job, index, problems)
                    except BadSampleError as error:
                        problems.append(Problem(error.reason, str(error)))
                        continue
                    for name, data in members:
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    samples += 1
            file.flush()
            os.fsync(file.fileno())
        record = {
            "samples": samples,
            "bytes": partial.stat().st_size,
            "sha256": _sha256(partial),
            "problems": [{"reason": problem.reason, "message": problem.message} for problem in problems],
        }
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _write(job.record(shard), json.dumps(record, indent=1).encode() + b"\n")


def _members(job: _Job, index: int, problems: list[Problem]) -> list[Member]:
    """The files of one sample. Adds to `problems` what it lost. Raises `BadSampleError`."""
    key = f"{index:09d}"
    if isinstance(job.reader, Pairs):
        return _pair_members(job.reader, index, key, job.settings)
    assert isinstance(job.reader, InterleavedReader)
    return _document_members(job.reader, index, key, job.settings, problems)


def _pair_members(reader: Pairs, index: int, key: str, settings: BuildSettings) -> list[Member]:
    pair = reader.source.pair(index)
    data, suffix = _encoded(pair.image, pair.name, settings)
    values = {**pair.metadata, "source": pair.name}
    return [
        (f"{key}.{suffix}", data),
        (f"{key}.txt", pair.caption.encode()),
        (f"{key}.json", json.dumps(values, ensure_ascii=False, default=str).encode()),
    ]


def _document_members(
    reader: InterleavedReader, index: int, key: str, settings: BuildSettings, problems: list[Problem]
) -> list[Member]:
    """The JSON first, then its pictures. Their names end in .jpg, whatever they are: so the layout looks them up."""
    content = reader.content(index)
    infos: list[dict[str, Any]] = []
    pictures: list[Member] = []
    remarks = [Problem(cast(Reason, reason), message) for reason, message in content.remarks]
    for placed in content.pictures:
        try:
            data, _ = _encoded(placed.source, f"{content.name}, picture {placed.info['image_name']}", settings)
        except BadSampleError as error:
            remarks.append(Problem("lost_picture", str(error)))
            continue
        stem = f"{len(pictures):02d}"
        infos.append({**placed.info, "image_name": f"{stem}.jpg", "source_image_name": placed.info["image_name"]})
        pictures.append((f"{key}-{stem}.jpg", data))
    values = {**content.values, "image_info": infos, "source": content.name}
    problems += remarks
    return [(f"{key}.json", json.dumps(values, ensure_ascii=False).encode()), *pictures]


def _encoded(source: PictureSource, name: str, settings: BuildSettings) -> tuple[bytes, str]:
    """The bytes to store and their suffix. Raises `BadSampleError` for a picture that cannot be decoded."""
    try:
        data = Path(source).read_bytes() if isinstance(source, str | Path) else source
        assert isinstance(data, bytes)
        image = load_picture(data, name)
    except FileNotFoundError as error:
        raise BadSampleError("missing_image", f"{name} does not exist") from error
    except PictureError as error:
        raise BadSampleError(picture_reason(error), str(error)) from error
    suffix = _SUFFIXES.get(Image.open(io.BytesIO(data)).format or "")
    too_large = settings.max_side is not None and max(image.size) > settings.max_side
    if suffix and not too_large:
        return data, suffix
    if settings.max_side is not None:
        image.thumbnail((settings.max_side, settings.max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue(), "jpg"


def _is_whole(job: _Job, shard: int) -> bool:
    """Whether a shard was finished earlier: its record is written last."""
    if not (job.record(shard).is_file() and job.tar(shard).is_file()):
        return False
    return json.loads(job.record(shard).read_text())["bytes"] == job.tar(shard).stat().st_size


def _verify(job: _Job, shard: int, record: dict[str, Any]) -> None:
    path = job.tar(shard)
    group = group_pairs if isinstance(job.reader, Pairs) else group_documents
    members = list(walk(path))
    again = f"remove {path.name} and {job.record(shard).name} and build again"
    if _sha256(path) != record["sha256"] or any(isinstance(member, Damage) for member in members):
        raise BuildError(f"{path} is not what was written; {again}")
    if len(group(members)) != record["samples"]:
        raise BuildError(f"{path} has {len(group(members))} samples, {record['samples']} were written; {again}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
