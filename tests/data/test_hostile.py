"""What people's folders hold beside good data: each of it is read rightly, told clearly, or counted by its reason."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreamllm.data import BadSampleError, UnknownDataError, make_reader
from dreamllm.documents import PictureError, load_picture
from tests.data.pictures import png, write_pairs, write_tar
from tests.tiny import tiny_model

PAIR = {"a.png": png(0), "a.txt": b"a caption"}


def outcome_of(reader, index: int) -> str:
    try:
        return reader.document(index).name
    except BadSampleError as error:
        return error.reason


# -- links ------------------------------------------------------------------------------------------------------------


def test_shards_and_folders_may_be_links(tmp_path):
    (tmp_path / "disk1").mkdir()
    (tmp_path / "disk2/deep").mkdir(parents=True)
    write_tar(tmp_path / "disk1/x.tar", PAIR)
    write_tar(tmp_path / "disk2/deep/y.tar", {"b.png": png(1), "b.txt": b"another"})
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.tar").symlink_to(tmp_path / "disk1/x.tar")
    (data / "more").symlink_to(tmp_path / "disk2")
    reader = make_reader("auto", data, mode="creation")
    assert [reader.document(i).name for i in range(len(reader))] == ["0.tar:a", "y.tar:b"]
    (data / "more" / "back").symlink_to(data)  # a circle
    assert len(make_reader("pair_tars", data)) == 2
    (tmp_path / "link").symlink_to(data)
    assert len(make_reader("auto", tmp_path / "link")) == 2


def test_pairs_in_linked_folders_are_found_once(tmp_path):
    write_pairs(tmp_path / "elsewhere", 3)
    data = write_pairs(tmp_path / "data", 2)
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "linked_again").symlink_to(tmp_path / "elsewhere")
    (data / "self").symlink_to(data)
    reader = make_reader("auto", data, mode="creation")
    names = [reader.document(i).name for i in range(len(reader))]
    assert names == ["data/0.png", "data/1.png", *(f"data/linked/{i}.png" for i in range(3))]


def test_a_link_to_nowhere_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", PAIR)
    (tmp_path / "1.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(FileNotFoundError, match=r"1\.tar"):
        make_reader("auto", tmp_path)
    (tmp_path / "1.tar").unlink()
    data = write_pairs(tmp_path / "pairs", 2)
    (data / "1.png").unlink()
    (data / "1.png").symlink_to(tmp_path / "gone.png")
    reader = make_reader("pair_folder", data, mode="creation")
    with pytest.raises(PictureError, match=r"1\.png does not exist"):
        load_picture(reader.document(1).pictures()[0].source)


# -- names in tars ----------------------------------------------------------------------------------------------------

PATHS = ["/etc/passwd", "../../escape", "..", "a/../../b", "./x", "x y", "a" * 90 + "/b", "äöü", "C:\\x", "-rf", "~/x"]


@pytest.mark.parametrize("name", PATHS)
def test_paths_of_members_are_names_and_nothing_else(tmp_path, name):
    """Nothing is unpacked: a path that leads out of its tar leads nowhere."""
    (tmp_path / "inside").mkdir()
    write_tar(tmp_path / "inside/0.tar", {f"{name}.png": png(0), f"{name}.txt": b"text", **PAIR})
    before = sorted(tmp_path.rglob("*"))
    reader = make_reader("pair_tars", tmp_path / "inside", mode="comprehension")
    documents = [reader.document(i) for i in range(len(reader))]
    assert documents[-1].text() == "a caption"
    assert len(documents) == (1 if name == ".." else 2)  # "...png" has no key: its name begins with a dot
    assert all(load_picture(picture.source).size == (16, 16) for d in documents for picture in d.pictures())
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_folders_in_tars_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for kind, name in (
            (tarfile.SYMTYPE, "a.png"),
            (tarfile.LNKTYPE, "b.png"),
            (tarfile.DIRTYPE, "c.png"),
            (tarfile.FIFOTYPE, "d.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
        for name in "abcd":
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
    reader = make_reader("pair_tars", tmp_path)
    assert [outcome_of(reader, i) for i in range(len(reader))] == ["missing_image"] * 4


# -- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["3", "null", '["a"]', '{"a": 1}', "true"])
def test_a_caption_that_is_not_text_is_counted(tmp_path, value):
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.json": f'{{"caption": {value}}}'.encode()})
    assert outcome_of(make_reader("pair_tars", tmp_path), 0) == "missing_caption"


@given(data=st.binary(max_size=40))
@settings(deadline=None, max_examples=60)
def test_any_bytes_as_caption_or_json_are_text_or_counted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    write_tar(folder / "0.tar", {"a.png": png(0), "a.txt": data, "b.png": png(1), "b.json": data})
    reader = make_reader("pair_tars", folder, mode="comprehension")
    for index in range(2):
        found = outcome_of(reader, index)
        assert found in ("0.tar:a", "0.tar:b", "malformed", "empty_caption", "missing_caption")
        if found.startswith("0.tar"):
            assert reader.document(index).text().encode().strip()


# -- folders of the wrong kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["pair_tars", "interleaved_tars", "interleaved_lines", "instructions", "conversations"]
)
def test_a_folder_of_another_kind_says_what_was_looked_for_and_found(tmp_path, kind):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(UnknownDataError, match=r"(?s)Looked for.*and found 1 \.md"):
        make_reader(kind, tmp_path)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for kind in ("pair_folder", "arrow", "auto", "pair_tars"):
        with pytest.raises((ValueError, FileNotFoundError, NotADirectoryError), match="file"):
            make_reader(kind, tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    with pytest.raises((PermissionError, UnknownDataError), match="locked"):
        make_reader("auto", folder)


# -- pictures ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = Image.fromarray(RAMP)
COLOUR = Image.merge("RGB", (GREY, GREY.rotate(90), GREY.rotate(180)))


def half_transparent(image: Image.Image) -> Image.Image:
    image.putalpha(Image.new("L", image.size, 255))
    return image


def two_frames(image: Image.Image) -> dict:
    return {"save_all": True, "append_images": [image.rotate(90)]}


MODES = {
    "grey": (encoded(GREY, "PNG"), GREY, 0),
    "black and white": (encoded(GREY.convert("1"), "PNG"), GREY.convert("1"), 0),
    "grey with alpha": (encoded(half_transparent(GREY.copy()), "PNG"), GREY, 0),
    "palette": (encoded(GREY.convert("P"), "PNG"), GREY, 0),
    "palette gif": (encoded(GREY.convert("P"), "GIF"), GREY, 0),
    "16 bit": (encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"), GREY, 0),
    "16 bit tiff": (encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"), GREY, 0),
    "cmyk": (encoded(COLOUR.convert("CMYK"), "JPEG", quality=100), COLOUR, 6),
    "cmyk tiff": (encoded(COLOUR.convert("CMYK"), "TIFF"), COLOUR, 0),
    "animated gif": (encoded(GREY.convert("P"), "GIF", **two_frames(GREY.convert("P"))), GREY, 0),
    "animated webp": (encoded(COLOUR, "WEBP", lossless=True, **two_frames(COLOUR)), COLOUR, 0),
    "animated png": (encoded(COLOUR, "PNG", **two_frames(COLOUR)), COLOUR, 0),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_become_rgb_by_their_first_frame(mode):
    data, expected, tolerance = MODES[mode]
    found = np.asarray(load_picture(data)).astype(int)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - np.asarray(expected.convert("RGB"))).max() <= tolerance


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = Image.fromarray((RAMP.astype(np.uint16) * 257) // 4)
    assert np.abs(np.asarray(load_picture(encoded(dark, "PNG")))[..., 0].astype(int) - RAMP // 4).max() <= 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@given(
    data=st.binary(max_size=300),
    beginning=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"II*\0", b"RIFF"]),
)
@settings(deadline=None, max_examples=150)
def test_any_bytes_are_a_picture_or_a_picture_error(data, beginning):
    try:
        outcome = load_picture(beginning + data).mode
    except PictureError as error:
        outcome = str(error)
    assert outcome == "RGB" or outcome.startswith(f"picture of {len(beginning + data)} bytes is ")


def test_a_picture_of_any_shape_goes_through_the_transforms(tmp_path):
    processor = tiny_model(tmp_path)[1]
    for size in ((1, 1), (1, 500), (700, 1), (3, 2)):
        image = Image.new("RGB", size, (10, 20, 30))
        assert processor.vision([image]).isfinite().all()
        assert (processor.target([image]).diff().abs() < 1e-6).all()


def test_a_folder_named_like_a_picture_is_a_bad_picture(tmp_path):
    data = write_pairs(tmp_path / "data", 2)
    (data / "1.png").unlink()
    (data / "1.png").mkdir()
    reader = make_reader("pair_folder", data, mode="creation")
    assert outcome_of(reader, 1) == "missing_image"
