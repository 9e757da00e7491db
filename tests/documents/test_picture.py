"""Pictures in every form they arrive in, and what is said of those that are broken."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from dreamllm.documents import OversizedPictureError, PictureError, load_picture, picture_size
from dreamllm.documents import picture as picture_module


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def colours():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def test_all_forms_give_the_same_picture(tmp_path, colours):
    (tmp_path / "a.png").write_bytes(png(colours))
    forms = [colours, np.asarray(colours), png(colours), tmp_path / "a.png", str(tmp_path / "a.png")]
    for form in forms:
        assert np.array_equal(np.asarray(load_picture(form)), np.asarray(colours))


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (1, 1), (200, 0, 0, 128))
    red, green, blue = load_picture(image).getpixel((0, 0))
    assert (red, green, blue) == pytest.approx((200 * 128 / 255 + 127, 127, 127), abs=1.5)


def test_grey_palette_and_16_bit_become_rgb():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(load_picture(ramp))[..., 1], ramp)
    palette = Image.fromarray(ramp).convert("P")
    assert np.array_equal(np.asarray(load_picture(palette))[..., 0], ramp)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert np.abs(np.asarray(load_picture(deep))[..., 0].astype(int) - ramp).max() <= 1


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert load_picture(buffer.getvalue()).size == (2, 4)


def test_broken_pictures_are_named(tmp_path, colours):
    with pytest.raises(PictureError, match=r"nowhere\.png does not exist"):
        load_picture(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(PictureError, match=r"text\.png is not an image file"):
        load_picture(tmp_path / "text.png")
    (tmp_path / "half.png").write_bytes(png(colours)[:60])
    with pytest.raises(PictureError, match=r"half\.png is corrupt"):
        load_picture(tmp_path / "half.png")
    with pytest.raises(PictureError, match="member 3 is not an image file"):
        load_picture(b"", name="member 3")


def test_decompression_bomb_is_refused(monkeypatch, colours):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(PictureError, match="too large"):
        load_picture(png(colours))


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros(4, np.uint8), np.zeros((0, 3), np.uint8)])
def test_arrays_must_be_pictures(array):
    with pytest.raises(PictureError, match="uint8"):
        load_picture(array)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="not int"):
        load_picture(5)


@pytest.mark.parametrize("read", [load_picture, picture_size])
def test_a_small_file_that_declares_a_huge_picture_is_refused_by_its_header(read, tmp_path):
    side = int(picture_module.MAX_PIXELS**0.5) + 1
    bomb = png(Image.new("1", (side, side)))
    assert len(bomb) < 1 << 20
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(OversizedPictureError, match=f"too large: it declares {side} x {side} pixels"):
        read(tmp_path / "bomb.png")


def test_the_size_is_read_without_decoding(colours, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(colours)[:60])  # the pixels are not even there
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for form in (png(colours), tmp_path / "a.png", str(tmp_path / "a.png"), colours, np.asarray(colours)):
        assert picture_size(form) == (7, 5)


def test_formats_that_start_programs_are_not_pictures():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(PictureError, match="not an image file"):
        load_picture(postscript)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_picture_error(colours, kind):
    buffer = io.BytesIO()
    colours.resize((40, 30)).save(buffer, kind)
    generator = np.random.default_rng(len(kind))
    whole = np.frombuffer(buffer.getvalue(), np.uint8)
    for _ in range(150):
        damaged = whole[: generator.integers(1, len(whole) + 1)].copy()
        places = generator.integers(0, min(len(damaged), 400), size=4)
        damaged[places] = generator.integers(0, 256, size=4)
        with contextlib.suppress(PictureError):
            load_picture(damaged.tobytes())
