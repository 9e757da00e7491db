"""Pages: what a reader sees, self-contained and safe."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dreamllm.documents import Document, End, Picture, PictureError, Text
from dreamllm.inference import document_page, write_page
from dreamllm.inference.page import TINY, flow
from tests.tiny import random_picture


class Seen(HTMLParser):
    """Text and pictures in reading order; checks that tags are balanced."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.resources, self.images = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.resources += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append(attributes)
            self.seen.append("picture")
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open and self.open[-1] not in ("style", "title"):
            self.seen.append(data.strip())


def decoded(attributes):
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",", 1)[1])))


def picture(seed=0, size=8):
    return Picture(random_picture(seed, size), comprehension=True, creation=True)


def test_text_and_pictures_stand_in_reading_order():
    document = Document((Text("two"), picture(1), Text("three"), picture(2, 100), Text("done"), End()))
    assert Seen(document_page(document)).seen == ["two", "picture", "three", "picture", "done"]


def test_pictures_keep_their_pixels():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    page = Seen(document_page(Document((Picture(grey, creation=True),))))
    assert decoded(page.images[0]).convert("L").tobytes() == grey.tobytes()


def test_tiny_pictures_are_enlarged_by_a_whole_factor():
    (image,) = Seen(document_page(Document((picture(0, 8),)))).images
    assert (image["class"], image["width"], image["height"]) == ("tiny", "96", "96")
    assert "image-rendering: pixelated" in document_page(Document((Text("a"),)))
    (image,) = Seen(document_page(Document((picture(0, TINY + 1),)))).images
    assert "class" not in image
    assert image["width"] == "65"


def test_the_page_needs_nothing_else():
    page = document_page(Document((Text("a"), picture())), prompt=Document((picture(3), Text("What?"))))
    assert all(resource.startswith("data:image/png;base64,") for resource in Seen(page).resources)
    assert not re.search(r"url\(|@import|<script|<link|http", page)


def test_text_cannot_become_markup():
    page = document_page(Document((Text("<script>alert(1)</script> & \x07\x1b"),)), title="<b>")
    assert "<script>" not in page
    assert "<title>&lt;b&gt;</title>" in page
    assert Seen(page).seen == ["<script>alert(1)</script> & \ufffd\ufffd"]


def test_blank_lines_make_paragraphs():
    assert flow(Document((Text("one\n\ntwo\nlines"),))) == "<p>one</p>\n<p>two<br>lines</p>"


def test_a_short_word_stays_with_its_picture():
    assert '<span class="together">two <img' in flow(Document((Text("two"), picture())))
    assert '<span class="together"> <img' in flow(Document((Text("w" * 50), picture())))


def test_the_prompt_stands_above_the_answer():
    assert Seen(document_page(Document((Text("seven"),)), prompt="What is this?")).seen == ["What is this?", "seven"]


def test_an_empty_answer_says_so():
    assert Seen(document_page(Document((End(),)))).seen == ["Nothing was written."]


def test_a_bad_picture_is_refused(tmp_path):
    with pytest.raises(PictureError, match="does not exist"):
        document_page(Document((Picture(tmp_path / "none.png", comprehension=True),)))


def test_the_page_is_written_as_utf8(tmp_path):
    write_page(tmp_path / "page.html", Document((Text("größer → 數"),)))
    assert "größer → 數" in (tmp_path / "page.html").read_text(encoding="utf-8")
