"""Walking through tars: as Python's tarfile does where they are whole, and on beyond damage where they are not."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamllm.data.tar_scan import BLOCK, Damage, Member, walk
from tests.data.pictures import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.text("abcXYZ0123-_. üß漢/", min_size=1, max_size=220).map(lambda n: n.strip("/")).filter(bool)


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(m.name.encode(), m.offset_data, m.size) for m in tar if m.isfile()]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
@settings(max_examples=60, deadline=None)
@given(members=st.lists(st.tuples(NAMES, st.integers(0, 1500), st.sampled_from("ffffdsl")), max_size=12))
def test_members_are_those_that_tarfile_finds(tmp_path_factory, kind, members):
    path = tmp_path_factory.getbasetemp() / f"{kind}.tar"
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, size, type_ in members:
            info = tarfile.TarInfo(name)
            info.mtime = size + 0.5  # a fraction needs an extended header in the pax format
            if type_ == "f":
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
            else:
                info.type = {"d": tarfile.DIRTYPE, "s": tarfile.SYMTYPE, "l": tarfile.LNKTYPE}[type_]
                info.linkname = "" if type_ == "d" else "target" * 40
                tar.addfile(info)
    # Names that end in a slash are folders to both; tarfile strips the slash.
    assert list(walk(path)) == by_tarfile(path)


def test_split_names_of_the_oldest_format(tmp_path):
    names = ["/".join(["folder"] * 12) + f"/{i:08d}.jpg" for i in range(5)]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    assert [m.name.decode() for m in walk(tmp_path / "a.tar")] == names


def test_numbers_beyond_octal_digits(tmp_path):
    """A size of 9 GiB, of which only the header is there."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    assert list(walk(tmp_path / "a.tar")) == [Member(b"big.jpg", BLOCK, 9 << 30)]


def three(tmp_path: Path, size: int = 700) -> Path:
    return write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([65 + i]) * size for i in range(3)})


def test_damage_costs_only_what_it_hits(tmp_path):
    path = three(tmp_path)
    whole = list(walk(path))
    data = bytearray(path.read_bytes())
    second_header = whole[1].offset - BLOCK
    data[second_header + 20] ^= 1
    path.write_bytes(data)
    assert list(walk(path)) == [whole[0], Damage(second_header, whole[2].offset - BLOCK - second_header), whole[2]]
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1  # tarfile ends there and says nothing


def test_a_hole_of_zeros_is_damage(tmp_path):
    path = three(tmp_path, 20_000)
    whole = list(walk(path))
    data = bytearray(path.read_bytes())
    start = whole[1].offset - BLOCK
    data[start : whole[2].offset - BLOCK] = bytes(whole[2].offset - BLOCK - start)
    path.write_bytes(data)
    assert list(walk(path)) == [whole[0], Damage(start, whole[2].offset - BLOCK - start), whole[2]]


def test_joined_tars_are_read_to_the_end(tmp_path):
    path = three(tmp_path)
    one = path.read_bytes()
    path.write_bytes(one + one)
    found = list(walk(path))
    assert [m.name for m in found] == [b"0.jpg", b"1.jpg", b"2.jpg"] * 2
    assert path.read_bytes()[found[5].offset :][:700] == b"C" * 700


@pytest.mark.parametrize("keep", [BLOCK + 300, 2 * BLOCK + BLOCK // 2, 3 * BLOCK + 100])
def test_a_cut_tar_gives_what_its_headers_name(tmp_path, keep):
    path = three(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    found = list(walk(path))
    assert found[0].name == b"0.jpg"
    assert all(isinstance(item, Damage) for item in found[1:])
    assert len(found) == (2 if keep == 3 * BLOCK + 100 else 1)  # the second header itself is cut


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04" * 400, "it begins with b'PK"),
        (gzip.compress(bytes(4000)), "gzip data; unpack"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.tar is not an uncompressed tar: .*{message}"):
        list(walk(tmp_path / "a.tar"))


def test_an_empty_archive_has_no_members(tmp_path):
    write_tar(tmp_path / "a.tar", {})
    assert list(walk(tmp_path / "a.tar")) == []
