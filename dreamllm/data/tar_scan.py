"""Where the members of an uncompressed tar lie, found by walking its headers (POSIX.1-2001 pax, ustar and GNU formats).

Unlike Python's tarfile, a damaged header does not silently end the archive: the walk goes on at the next header that is
whole, and says which bytes were lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
_WINDOW = 1 << 14
_SEARCH_WINDOW = 1 << 20
_RECORD_BLOCKS = 20
"""A tar is padded with zeros to a multiple of this many blocks; headers after more zeros than these are damage."""
_MAX_EXTENSION_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name as stored, and where its bytes lie."""

    name: bytes
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """Bytes of a tar that could not be understood."""

    offset: int
    size: int


def walk(path: Path) -> Iterator[Member | Damage]:
    """The regular files and the damaged places of a tar, in order. A tar that ends early gives what its headers name.

    Raises `ValueError` for a file that does not begin like an uncompressed tar.
    """
    with open(path, "rb", buffering=0) as file:
        yield from _Walk(path, file.fileno()).members()


class _HeaderError(Exception):
    """A block that is not a header."""


class _Walk:
    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size
        self.window, self.window_start = b"", 0

    def members(self) -> Iterator[Member | Damage]:
        self._check_beginning()
        offset = 0
        name: bytes | None = None  # what an extension says of the next member
        length: int | None = None
        while offset < self.size:
            header = self._header(offset)
            if header is None:
                end, lost = self._gap(offset)
                if lost:
                    yield Damage(offset, end - offset)
                offset, name, length = end, None, None
                continue
            offset += BLOCK
            if header.kind == b"L":
                name = self._extension(offset, header.size).rstrip(b"\0")
            elif header.kind == b"x":
                name, length = _pax(self._extension(offset, header.size), name)
            elif header.kind not in (b"K", b"g"):
                name, size = name or header.name, header.size if length is None else length
                if header.regular and not name.endswith(b"/"):
                    yield Member(name, offset, size)
                offset = self._after(offset, header, size)
                name = length = None
                continue
            offset = self._after(offset, header, header.size)

    def _header(self, offset: int) -> _Header | None:
        try:
            return _Header(self._block(offset))
        except _HeaderError:
            return None

    def _gap(self, offset: int) -> tuple[int, bool]:
        """Where to go on from a block that is no header, and whether something was lost before that."""
        following = self._next_header(offset)
        end = self.size if following is None else following
        if any(self._block(offset)):
            return end, True
        # Zeros end an archive; after a few of them another one may follow (cat a.tar b.tar).
        return end, following is not None and end - offset > _RECORD_BLOCKS * BLOCK

    def _after(self, offset: int, header: _Header, size: int) -> int:
        if header.kind == b"S":
            offset = self._skip_sparse_map(offset, header.more_sparse_blocks)
        return offset + (-(-size // BLOCK) * BLOCK if header.has_data else 0)

    def _check_beginning(self) -> None:
        if not self.size:
            raise ValueError(f"{self.path} is not an uncompressed tar: it is empty")
        block = self._block(0)
        if any(block):
            try:
                _Header(block)
            except _HeaderError as error:
                beginning = "gzip data; unpack it with gunzip" if block[:2] == b"\x1f\x8b" else repr(block[:12])
                raise ValueError(f"{self.path} is not an uncompressed tar: it begins with {beginning}") from error

    def _block(self, offset: int) -> bytes:
        within = offset - self.window_start
        if not 0 <= within <= len(self.window) - BLOCK:
            self.window, self.window_start, within = os.pread(self.descriptor, _WINDOW, offset), offset, 0
        return self.window[within : within + BLOCK]

    def _next_header(self, offset: int) -> int | None:
        """Where the next whole header with the mark of ustar stands after the block at `offset`."""
        offset += BLOCK
        while window := os.pread(self.descriptor, _SEARCH_WINDOW, offset):
            mark = window.find(b"ustar")
            while mark >= 0:
                begin = mark - 257
                if begin >= 0 and begin % BLOCK == 0 and _is_header(window[begin : begin + BLOCK]):
                    return offset + begin
                mark = window.find(b"ustar", mark + 1)
            offset += _SEARCH_WINDOW
        return None

    def _extension(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, min(size, _MAX_EXTENSION_BYTES), offset)

    def _skip_sparse_map(self, offset: int, more: bool) -> int:
        while more:
            more = os.pread(self.descriptor, BLOCK, offset)[504:505] not in (b"\0", b"")
            offset += BLOCK
        return offset


class _Header:
    """The fields of one header block. Raises `_HeaderError`."""

    def __init__(self, block: bytes) -> None:
        if len(block) < BLOCK or not any(block):
            raise _HeaderError("it is cut short or blank")
        # The checksum counts its own eight bytes as spaces.
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise _HeaderError("its checksum is wrong")
        self.kind = block[156:157]
        self.size = _number(block[124:136])
        if self.size < 0:
            raise _HeaderError("its size is negative")
        self.name = block[:100].partition(b"\0")[0]
        prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
        if prefix and self.kind not in (b"L", b"K", b"S"):
            self.name = prefix + b"/" + self.name
        self.more_sparse_blocks = block[482] != 0

    @property
    def regular(self) -> bool:
        return self.kind in (b"0", b"\0", b"7")

    @property
    def has_data(self) -> bool:
        """Links, devices and folders have none, whatever their size field says."""
        return self.kind not in (b"1", b"2", b"3", b"4", b"5", b"6")


def _is_header(block: bytes) -> bool:
    try:
        _Header(block)
    except _HeaderError:
        return False
    return True


def _number(field: bytes) -> int:
    """Octal digits, or a big-endian number after a byte 0x80 (0xff: negative), as GNU writes large sizes."""
    if field[:1] in (b"\x80", b"\xff"):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0x80 else value - (1 << 8 * (len(field) - 1))
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise _HeaderError("a number in it is not octal") from error


def _pax(data: bytes, name: bytes | None) -> tuple[bytes | None, int | None]:
    """Path and size of an extended header, records of the form `length key=value` and a newline."""
    size = None
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        key, _, value = record.partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size" and value.isdigit():
            size = int(value)
    return name, size
