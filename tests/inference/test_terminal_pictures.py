"""Pictures on terminals that can show them: what is asked, what is sent, and a whole chat on a pseudo-terminal."""

import base64
import fcntl
import io
import os
import re
import select
import struct
import termios
import threading

import numpy as np
import pytest
from PIL import Image

from dreamllm.inference import command
from dreamllm.inference.terminal import UPPER_HALF
from dreamllm.inference.terminal_pictures import ask, cell_width, encode, fit, iterm2, kitty, sixel, way_of
from tests.tiny import random_picture, tiny_model

KITTY_OK = b"\033_Gi=4711;OK\033\\"
KITTY_NO = b"\033_Gi=4711;ENOTSUP:no\033\\"
PLAIN, WITH_SIXEL = b"\033[?62;22c", b"\033[?62;4;22c"


class Terminal:
    """The other side of a pseudo-terminal, which answers what it is asked and types what it is given."""

    def __init__(self, answers=b"", typed=()):
        self._master, slave = os.openpty()
        self.source, self.target = os.fdopen(os.dup(slave)), os.fdopen(slave, "w")
        self.shown = b""
        self._answers, self._typed = answers, list(typed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self):
        while not self._ended.is_set():
            if not select.select([self._master], [], [], 0.02)[0]:
                continue
            self.shown += os.read(self._master, 65536)
            if self._answers and b"\033[c" in self.shown:
                os.write(self._master, self._answers)
                self._answers = b""
            if self._typed and self.shown.endswith(b"> "):  # the prompt
                os.write(self._master, self._typed.pop(0).encode() + b"\n")

    def close(self):
        """What was shown."""
        self.target.flush()
        termios.tcdrain(self.target.fileno())
        while select.select([self._master], [], [], 0.1)[0]:
            pass  # until all is read
        self._ended.set()
        self._thread.join()
        self.source.close()
        self.target.close()
        os.close(self._master)
        return self.shown


@pytest.mark.parametrize(
    ("answers", "environment", "way"),
    [
        (KITTY_OK + PLAIN, {}, "kitty"),
        (KITTY_OK + WITH_SIXEL, {}, "kitty"),
        (KITTY_NO + WITH_SIXEL, {}, "sixel"),
        (WITH_SIXEL, {"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app", "TMUX": "x"}, "sixel"),
        (PLAIN, {"COLORTERM": "truecolor"}, "blocks"),
        (PLAIN, {"COLORTERM": "24bit"}, "blocks"),
        (PLAIN, {"TERM": "xterm-direct"}, "blocks"),
        (PLAIN, {"TERM": "xterm-256color"}, "none"),
        (b"\033[?64;42c", {}, "none"),  # an attribute that only contains a 4
        (b"", {"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        (b"", {"TERM": "dumb"}, "none"),
    ],
)
def test_a_terminal_is_asked_what_it_can(answers, environment, way):
    terminal = Terminal(answers)
    before = termios.tcgetattr(terminal.source.fileno())
    assert way_of(terminal.source, terminal.target, environment) == way
    assert termios.tcgetattr(terminal.source.fileno()) == before
    terminal.close()


def test_a_terminal_that_does_not_answer_is_not_waited_for():
    terminal = Terminal()
    assert ask(terminal.source.fileno(), terminal.target.fileno(), seconds=0.05) == b""
    terminal.close()


def test_what_is_no_terminal_is_not_asked(tmp_path):
    with open(tmp_path / "out", "w") as target, open(tmp_path / "out") as source:
        assert way_of(source, target, {"COLORTERM": "truecolor"}) == "none"
    assert not (tmp_path / "out").read_text()


def test_kitty_gets_a_png_in_chunks():
    image = random_picture(1, 100)  # noise: several chunks
    sent = re.findall(r"\033_G([^;]*);([A-Za-z0-9+/=]*)\033\\", kitty(image))
    assert len(sent) > 2
    assert all(len(chunk) <= 4096 for _, chunk in sent)
    assert [control for control, _ in sent] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(sent) - 2), "m=0"]
    data = base64.b64decode("".join(chunk for _, chunk in sent))
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


def test_iterm2_gets_a_png():
    image = random_picture(1, 30)
    size, data = re.fullmatch(r"\033\]1337;File=inline=1;size=(\d+);[^:]*:([A-Za-z0-9+/=]*)\a", iterm2(image)).groups()
    assert len(base64.b64decode(data)) == int(size)
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()


def decoded(text):
    """A sixel picture as a VT340 reads it: RGB in percent; -1 where nothing was drawn."""
    body = re.fullmatch(r"\033P0;1q(.*)\033\\", text, re.S)[1]
    width, height = map(int, re.match(r'"1;1;(\d+);(\d+)', body).groups())
    pixels = np.full((height + 6, width, 3), -1)
    colours, colour, x, y = {}, None, 0, 0
    for token in re.findall(r'"[\d;]+|#\d+(?:;2;\d+;\d+;\d+)?|!\d+[?-~]|[?-~]|[$-]', body):
        if token[0] == "#":
            number, *rgb = token[1:].split(";")
            colours.setdefault(number, [int(value) for value in rgb[1:]])
            colour = colours[number]
        elif token in "$-":
            x, y = 0, y + 6 * (token == "-")
        elif token[0] != '"':
            count = int(token[1:-1]) if token[0] == "!" else 1
            bits = ord(token[-1]) - 63
            for row in range(6):
                if bits >> row & 1:
                    pixels[y + row, x : x + count] = colour
            x += count
    return pixels[:height]


@pytest.mark.parametrize("size", [(7, 5), (20, 13), (64, 6), (1, 1)])
def test_sixels_are_the_picture(size):
    generator = np.random.default_rng(0)
    few = generator.integers(0, 256, (200, 3))[generator.integers(0, 200, size[::-1])].astype(np.uint8)
    found = decoded(sixel(Image.fromarray(few)))
    assert found.shape == few.shape
    assert np.abs(found - few / 2.55).max() <= 0.5 + 1e-6  # percent, rounded; so few colours are kept as they are


def test_sixels_of_many_colours_are_near():
    smooth = np.stack([*np.meshgrid(np.arange(64), np.arange(64)), np.full((64, 64), 30)], 2).astype(np.uint8) * 4
    found = decoded(sixel(Image.fromarray(smooth)))
    assert (found >= 0).all()
    assert np.abs(found - smooth / 2.55).mean() < 5


def test_pictures_fit_the_terminal():
    assert fit(Image.new("RGB", (8, 8)), 1000).size == (192, 192)
    assert fit(Image.new("RGB", (8, 8)), 60).size == (56, 56)
    assert fit(Image.new("RGB", (8, 8)), 4).size == (8, 8)
    assert fit(Image.new("RGB", (512, 256)), 100).size == (100, 50)
    assert fit(Image.new("RGB", (512, 256)), 600).size == (512, 256)
    assert encode(Image.new("RGB", (8, 8)), "none", 80) == ""
    assert UPPER_HALF in encode(Image.new("RGB", (8, 8)), "blocks", 80)


def test_the_width_of_a_character_is_the_terminals():
    terminal = Terminal()
    assert cell_width(terminal.target) == 8
    fcntl.ioctl(terminal.target.fileno(), termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 960, 480))
    assert cell_width(terminal.target) == 12
    terminal.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    drawing = {"steps": 2, "scheduler": "ddim", "guidance_scale": 2.0}
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), drawing=drawing)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("answers", "beginning"), [(KITTY_OK + PLAIN, b"\033_Ga=T"), (WITH_SIXEL, b'\033P0;1q"1;1;192;192'), (PLAIN, None)]
)
def test_a_chat_on_a_terminal(folder, tmp_path, monkeypatch, answers, beginning):
    """Pictures are saved and named, and shown where the terminal can; the answer to the question is not taken for a
    message, nor shown."""
    wanted = iter(["picture", "end"])

    def choose(logits, bias):
        free = bias.isfinite().nonzero().flatten()
        return [int({"picture": free[-1], "end": free[2]}[next(wanted)]) for _ in logits]

    monkeypatch.setattr("dreamllm.inference.writing.most_likely", choose)
    terminal = Terminal(answers, typed=["Draw", "/quit"])
    monkeypatch.setattr("sys.stdin", terminal.source)
    monkeypatch.setattr("sys.stdout", terminal.target)
    for name in ("COLORTERM", "TERM_PROGRAM", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    command.chat(folder, save=tmp_path / "made")
    shown = terminal.close()
    assert f"[{tmp_path}/made/picture-001.png]".encode() in shown
    if beginning is None:
        assert b"\033P" not in shown
        assert b"\033_Ga" not in shown
    else:
        assert beginning in shown
    assert answers not in shown
