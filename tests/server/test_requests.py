"""What requests may hold, and what each refusal says."""

import json
import struct
import zlib

import pytest
from PIL import Image

from dreamllm.server import Limits
from tests.server.support import (
    CHAT,
    COMPLETIONS,
    IMAGES,
    MODEL,
    Scripted,
    chat,
    data_url,
    encoded,
    hello,
    image_part,
    serving,
)
from tests.tiny import random_picture

BOMB = 30_000


def test_the_standard_fields_that_change_nothing_are_accepted(quick_server):
    fields = {
        "n": 1, "user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "response_format": {"type": "text"},
        "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "tools": [], "tool_choice": "none",
        "logit_bias": {}, "store": False, "modalities": ["text"], "temperature": 0, "top_p": 0.5, "top_k": 5,
        "seed": None, "stop": None, "max_tokens": 5, "max_completion_tokens": 5, "stream": None,
    }  # fmt: skip
    reply = quick_server.post(CHAT, chat("Hi", **fields))
    assert reply.status == 200, reply.body
    assert reply.json["choices"][0]["message"]["content"] == "Hello."


def one(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 2}, "n", "should be 1"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "less than or equal to 0"),
        ({"logprobs": True}, "logprobs", "logprobs: "),
        ({"tools": [{"type": "function"}]}, "tools", "tools: "),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "should be 'text'"),
        ({"colour": "red"}, "colour", "unknown or unsupported parameter 'colour'"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**9}, "max_tokens", "beyond the limit of this server, 2048"),
        ({"max_tokens": 10**4000}, None, "not valid JSON"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than or equal to 9223372036854775807"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream only"),
        ({"pictures": "some"}, "pictures", "'allow', 'forbid' or 'force'"),
        ({"pictures": "force", "max_pictures": 0}, "max_pictures", "at least 1"),
        ({"max_pictures": 11}, "max_pictures", "beyond the limit"),
        ({"drawing": {"steps": 251}}, "steps", "beyond the limit of this server, 250"),
        ({"drawing": {"size": 1032}}, "size", "beyond the limit"),
        ({"drawing": {"scheduler": "euler"}}, "drawing.scheduler", "'ddpm', 'ddim' or 'dpm++'"),
        ({"drawing": {"candidates": 2}}, "drawing.candidates", "unknown"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role", "must alternate"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "messages[1].role", "not 'assistant'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "the user's"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "empty"),
        ({"messages": one([{"type": "audio"}])}, "messages[0].content[0]", "'text', 'image_url'"),
        ({"messages": one([{"type": "text", "text": 5}])}, "messages[0].content[0].text", "string"),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "messages", "200001 characters, at most 200000"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_and_the_reason(quick_server, fields, param, message):
    reply = quick_server.post(CHAT, {**chat("Hi"), **fields}) if 10**4000 not in fields.values() else (
        quick_server.post(CHAT, b'{"max_tokens": 1' + b"0" * 5000 + b"}")
    )  # fmt: skip
    assert reply.status == 400
    assert message in reply.error["message"]
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": None}, "prompt: "),
        ({"n": 11}, "n 11 is beyond the limit"),
        ({"n": 0}, "n: "),
        ({"size": "512x256"}, "a square"),
        ({"size": "512"}, "a square"),
        ({"size": "2048x2048"}, "size 2048 is beyond the limit of this server, 1024"),
        ({"response_format": "url"}, "should be 'b64_json'"),
        ({"quality": "hd"}, "quality: "),
        ({"guidance_scale": -1}, "guidance_scale: "),
        ({"output_format": "webp"}, "output_format: "),
        ({"stream": "yes"}, "stream: "),
        ({"partial_images": 2}, "partial_images has a meaning with stream only"),
        ({"stream": True, "partial_images": 21}, "less than or equal to 20"),
    ],
)
def test_refusals_of_pictures(quick_server, fields, message):
    reply = quick_server.post(IMAGES, {"prompt": "seven", **fields})
    assert reply.status == 400
    assert message in reply.error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": " "}, "prompt", "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "prompt", "string"),
        ({"prompt": "x" * 200_001}, "prompt", "200001 characters, at most 200000"),
        ({"prompt": "![a](data:image/png;base64,AAAA)"}, "prompt, picture 1", "not one"),
        ({"prompt": "![a](data:image/png;base64,AAAA)" * 9}, "prompt", "9 pictures were given, at most 8"),
        ({"prompt": "![a](data:image/png;base64,A===)"}, "prompt, picture 1", "base64 is malformed"),
        ({"echo": True}, "echo", "should be False"),
        ({"suffix": "x"}, "suffix", "suffix: "),
        ({"n": 2}, "n", "should be 1"),
        ({"messages": []}, "messages", "unknown or unsupported"),
        ({"max_tokens": 2049}, "max_tokens", "beyond the limit"),
        ({"preview_every": 1}, "preview_every", "with stream only"),
        ({"stream": True, "preview_every": -1}, "preview_every", "greater than or equal to 0"),
        ({"model": "gpt-4"}, "model", "does not exist"),
    ],
)  # fmt: skip
def test_refusals_of_documents(quick_server, fields, param, message):
    reply = quick_server.post(COMPLETIONS, {"model": MODEL, "prompt": "One", **fields})
    assert reply.status == (404 if param == "model" else 400)
    assert message in reply.error["message"]
    assert reply.error["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
    ],
)
def test_bodies_that_are_no_requests(quick_server, body, message):
    reply = quick_server.post(CHAT, body)
    assert reply.status == 400
    assert message in reply.error["message"]


def test_other_kinds_of_requests(quick_server):
    assert quick_server.request("POST", CHAT, b"{}", {"content-type": "text/plain"}).status == 415
    assert quick_server.post(CHAT, b"{}", **{"content-encoding": "gzip"}).status == 415
    assert quick_server.get(CHAT).status == 405
    assert quick_server.get("/v1/files").status == 404
    assert quick_server.get("/docs").status == 404
    for path in ("/v1/models/../../etc/passwd", "/../etc/passwd", "/v1/models/%2e%2e%2fetc%2fpasswd"):
        assert quick_server.get(path).error["code"] in ("unknown_url", "model_not_found")


def test_a_body_beyond_the_limit():
    with serving(Scripted(hello), Limits(max_body_bytes=1000)) as address:
        assert address.post(CHAT, chat("x" * 800)).status == 200
        reply = address.post(CHAT, chat("x" * 1000))
        assert reply.status == 413
        assert "more than 1000 bytes" in reply.error["message"]
        pieces = iter([b" " * 600, b" " * 600])
        connection = address.connect()
        connection.request("POST", CHAT, pieces, {"content-type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_a_body_that_does_not_arrive():
    with serving(Scripted(hello), Limits(body_seconds=1)) as address:
        connection = address.connect()
        connection.putrequest("POST", CHAT)
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "100")
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert response.status == 408
        assert "within 1 seconds" in json.loads(response.read())["error"]["message"]


# -- pictures --------------------------------------------------------------------------------


def ask(address, *parts):
    return address.post(CHAT, chat(list(parts)))


def png_header(width, height):
    """A PNG of a few bytes that declares any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animation(kind):
    frames = [random_picture(seed) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not one of BMP, GIF, JPEG, PNG, WEBP"),
        (b"hello", "not one of BMP, GIF, JPEG, PNG, WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of"),
        (encoded(random_picture(1), "TIFF"), "not one of"),
        (png_header(BOMB, BOMB), "too many pixels"),
        (png_header(1, 100_000), "1 x 100000 pixels"),
        (png_header(100_000, 1), "at most 20 times the shorter"),
        (png_header(0, 0), "a picture"),
        (png_header(2**31 - 1, 2**31 - 1), "too many pixels"),
        (encoded(random_picture(1))[:-40], "corrupt"),
        (encoded(random_picture(1, 64), "JPEG")[:-200], "corrupt"),
        (animation("GIF"), "animated"),
        (animation("WEBP"), "animated"),
        (animation("PNG"), "animated"),
    ],
    ids=[
        "empty", "text", "eps", "tiff", "bomb", "tall", "wide", "nothing", "huge", "cut_png", "cut_jpeg", "gif",
        "webp", "apng",
    ],
)  # fmt: skip
def test_pictures_that_are_refused(quick_server, data, message):
    reply = ask(quick_server, {"type": "text", "text": "?"}, image_part(data))
    assert reply.status == 400
    assert message in reply.error["message"]
    assert reply.error["param"] == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "/etc/passwd", "ftp://x/y", "", "data:text/plain;base64,QQ==", "data:image/png,abc",
        "data:image/png;base64,@",
    ],
)  # fmt: skip
def test_what_is_no_data_url_is_refused(quick_server, url):
    reply = ask(quick_server, {"type": "image_url", "image_url": {"url": url}})
    assert reply.status == 400
    assert "data:image/png;base64,..." in reply.error["message"] or "base64 is malformed" in reply.error["message"]


def test_addresses_are_refused_unless_allowed(quick_server):
    reply = ask(quick_server, {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})
    assert reply.status == 400
    assert reply.error["code"] == "image_address_refused"


def seen(data):
    """The picture that the model is shown."""
    backend = Scripted()
    jobs = []
    backend._script = lambda job: (jobs.append(job), job.answer("ok"))
    with serving(backend) as address:
        assert ask(address, image_part(data)).status == 200
    return jobs[0].work.prompt.pictures()[0].source


def test_pictures_are_shown_upright_and_in_colour():
    image = random_picture(5, 16).resize((16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = seen(encoded(image, "PNG", exif=exif))
    assert turned.size == (8, 16)
    assert turned.tobytes() == image.rotate(-90, expand=True).tobytes()
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert seen(encoded(palette)).tobytes() == palette.convert("RGB").tobytes()
    cmyk = image.convert("CMYK")
    assert seen(encoded(cmyk, "JPEG", quality=100)).mode == "RGB"


def test_limits_of_pictures():
    limits = Limits(max_pictures_in=2, max_picture_bytes=2000, max_picture_pixels=2 * 16 * 16)
    with serving(Scripted(hello), limits) as address:
        small = image_part(random_picture(1))
        assert ask(address, small, small).status == 200
        assert "3 pictures were given, at most 2" in ask(address, small, small, small).error["message"]
        assert "more than 512 together" in ask(address, small, image_part(random_picture(1, 17))).error["message"]
        assert "bytes, at most 2000" in ask(address, image_part(random_picture(1, 64))).error["message"]
        padded = encoded(random_picture(1)) + b"\0" * 1500
        assert "at most 2000" in ask(address, image_part(padded)).error["message"]


def test_a_reply_repeats_no_long_address(quick_server):
    reply = ask(quick_server, {"type": "image_url", "image_url": {"url": "x" * 10_000}})
    assert len(reply.body) < 500


def test_model_names(quick_server):
    reply = quick_server.post(CHAT, {**chat("Hi"), "model": "gpt-4"})
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"
    assert quick_server.get(f"/v1/models/{MODEL}").status == 200


def test_data_urls_may_name_another_format_than_they_hold(quick_server):
    part = {"type": "image_url", "image_url": {"url": data_url(encoded(random_picture(1), "JPEG"), "png")}}
    assert ask(quick_server, part).status == 200
