"""The unmodified `openai` client against a tiny model."""

import base64
import io
import re

import openai
import pytest
from openai import OpenAI
from PIL import Image

from dreamllm.documents import Document, Picture, Text
from dreamllm.inference import GenerationOptions
from tests.server.conftest import QUICK
from tests.server.support import MODEL, data_url, encoded, image_part, text_part
from tests.tiny import random_picture

_PICTURE = re.compile(r"!\[picture \d+\]\(data:image/png;base64,([^)]*)\)")


@pytest.fixture
def client(model_server):
    with OpenAI(base_url=f"{model_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pictures_in(content):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in _PICTURE.findall(content)]


def test_the_answer_is_the_engine_s(client, engine):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "The license"}],
        max_tokens=12,
        extra_body={"pictures": "forbid"},
    )
    expected = engine.answer(
        engine.processor.chat([("user", "The license")]), GenerationOptions(max_new_tokens=12, pictures="forbid")
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == {"end": "stop"}.get(expected.stopped, "length")
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == len(engine.processor.encode(engine.processor.chat([("user", "The license")])))


def test_pictures_in_a_message_reach_the_model_in_their_places(client, engine):
    pictures = [random_picture(1), random_picture(2)]
    content = [image_part(pictures[0]), text_part("What is"), image_part(pictures[1]), text_part("this?")]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=6, extra_body={"pictures": "forbid"}
    )
    expected = engine.answer(
        engine.processor.chat([("user", "<image>What is<image>this?")], pictures),
        GenerationOptions(max_new_tokens=6, pictures="forbid"),
    )
    assert answer.choices[0].message.content == expected.text


def test_an_answer_holds_its_pictures_and_can_be_sent_back(client, engine):
    drawing = {"steps": 2, "guidance_scale": 2.0, "scheduler": "ddim"}
    extra = {"pictures": "force", "max_pictures": 1, "drawing": drawing}
    messages = [{"role": "user", "content": "Draw"}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, seed=7, extra_body=extra)
    options = GenerationOptions(max_new_tokens=5, pictures="force", max_pictures=1, seed=7, drawing=QUICK)
    expected = engine.answer(engine.processor.chat([("user", "Draw")]), options)
    (picture,) = pictures_in(first.choices[0].message.content)
    assert picture.tobytes() == expected.pictures[0].tobytes()

    messages += [first.choices[0].message, {"role": "user", "content": "Again"}]
    again = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=5, extra_body={"pictures": "forbid"}
    )
    turns = [("user", "Draw"), ("assistant", f"<dream>{expected.text}"), ("user", "Again")]
    prompt = engine.processor.chat(turns, expected.pictures)
    assert again.usage.prompt_tokens == len(engine.processor.encode(prompt))
    expected = engine.answer(prompt, GenerationOptions(max_new_tokens=5, pictures="forbid"))
    assert again.choices[0].message.content == expected.text


def test_a_stream_is_the_same_answer(client):
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Draw"}],
        "max_tokens": 5,
        "seed": 3,
        "temperature": 1.5,
        "extra_body": {"pictures": "force", "max_pictures": 1},
    }
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(deltas) > 4
    # Bytes that make no character come at the end as what they seemed to be, or not at all.
    assert "".join(deltas).replace("\ufffd", "") == whole.choices[0].message.content.replace("\ufffd", "")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(pictures_in("".join(deltas))) == 1


def test_stop_strings(client):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "The license"}], "max_tokens": 30}
    body["extra_body"] = {"pictures": "forbid"}
    text = client.chat.completions.create(**body).choices[0].message.content
    stop = text[10:13]
    stopped = client.chat.completions.create(**body, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_seeds_repeat_an_answer_and_a_missing_one_is_told(client):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Write"}], "max_tokens": 12, "temperature": 2.0}
    body["extra_body"] = {"pictures": "forbid"}
    first = client.chat.completions.create(**body)
    again = client.chat.completions.create(**body, seed=first.model_extra["seed"])
    other = client.chat.completions.create(**body, seed=first.model_extra["seed"] + 1)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


@pytest.mark.parametrize("least", [{"temperature": 1e-308}, {"temperature": 1.0, "top_p": 1e-308}])
def test_the_least_of_chance_is_the_most_likely_token(client, least):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Write"}], "max_tokens": 6}
    body["extra_body"] = {"pictures": "forbid"}
    likely = client.chat.completions.create(**body).choices[0].message.content
    assert client.chat.completions.create(**body, **least).choices[0].message.content == likely


def test_images(client, engine):
    answer = client.images.generate(model=MODEL, prompt="seven", n=2, size="8x8", extra_body={"seed": 5})
    options = GenerationOptions(
        max_new_tokens=0, pictures="force", seed=5, drawing=QUICK.__class__(**{**QUICK.__dict__, "candidates": 2})
    )
    expected = engine.answer(Document((Text("seven"),), "error"), options)
    drawn = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in answer.data]
    assert [d.tobytes() for d in drawn] == [p.tobytes() for p in expected.pictures]
    assert answer.size == "8x8"
    other = client.images.generate(prompt="seven", extra_body={"seed": 5, "guidance_scale": 1.0})
    assert other.data[0].b64_json != answer.data[0].b64_json


def test_a_document_is_continued_as_it_stands(client, engine):
    picture = random_picture(4)
    start = f"The license ![a picture]({data_url(encoded(picture))}) and"
    answer = client.completions.create(model=MODEL, prompt=start, max_tokens=8, extra_body={"pictures": "forbid"})
    parts = (Text("The license "), Picture(picture, comprehension=True), Text(" and"))
    expected = engine.answer(Document(parts, "error"), GenerationOptions(max_new_tokens=8, pictures="forbid"))
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == len(expected.token_ids)
    in_chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "The license"}], max_tokens=8,
        extra_body={"pictures": "forbid"},
    )  # fmt: skip
    assert answer.usage.prompt_tokens != in_chat.usage.prompt_tokens


def test_a_stream_of_a_document_is_the_same_document(client):
    body = {"model": MODEL, "prompt": "One", "max_tokens": 5, "seed": 3, "temperature": 1.5}
    body["extra_body"] = {"pictures": "force", "max_pictures": 1}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text.replace("\ufffd", "") == whole.choices[0].text.replace("\ufffd", "")
    assert len(pictures_in(text)) == 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("kind", ["chat", "document"])
def test_previews_come_before_their_picture_where_they_are_asked_for(client, kind):
    extra = {"pictures": "force", "max_pictures": 1, "preview_every": 1, "drawing": {"steps": 4}}
    body = {"model": MODEL, "max_tokens": 3, "stream": True, "extra_body": extra}
    if kind == "chat":
        chunks = client.chat.completions.create(messages=[{"role": "user", "content": "Draw"}], **body)
        told = [(chunk.choices[0].delta.model_extra.get("preview"), chunk.choices[0].delta.content) for chunk in chunks]
    else:
        chunks = client.completions.create(prompt="Draw", **body)
        told = [(chunk.choices[0].model_extra.get("preview"), chunk.choices[0].text) for chunk in chunks]
    at = next(i for i, (_, text) in enumerate(told) if "![picture 1]" in (text or ""))
    previews = [preview for preview, _ in told[:at] if preview]
    assert [(preview["step"], preview["steps"]) for preview in previews] == [(1, 4), (2, 4), (3, 4)]
    images = [Image.open(io.BytesIO(base64.b64decode(preview["image"].partition(",")[2]))) for preview in previews]
    assert {image.size for image in images} == {(8, 8)}
    assert len({image.tobytes() for image in images}) == 3
    assert not any(preview for preview, _ in told[at:])


def test_images_as_a_stream(client):
    extra = {"seed": 5, "steps": 6}
    whole = client.images.generate(model=MODEL, prompt="seven", n=2, extra_body=extra)
    events = list(
        client.images.generate(model=MODEL, prompt="seven", n=2, stream=True, partial_images=2, extra_body=extra)
    )
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [(e.index, e.partial_image_index, e.step) for e in partial] == [(0, 0, 2), (1, 0, 2), (0, 1, 4), (1, 1, 4)]
    done = [event for event in events if event.type == "image_generation.completed"]
    assert [event.b64_json for event in done] == [one.b64_json for one in whole.data]
    assert done[0].usage.input_tokens == whole.usage.input_tokens
    assert done[0].size == "8x8"
    quiet = client.images.generate(model=MODEL, prompt="seven", stream=True, extra_body=extra)
    assert [event.type for event in quiet] == ["image_generation.completed"]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "dreamllm"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_errors_are_the_client_s_own(client):
    with pytest.raises(openai.BadRequestError, match="257 more than the context of 256") as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "license " * 500}])
    assert refused.value.code == "invalid_request"
    assert re.fullmatch("[0-9a-f]{32}", refused.value.request_id)
    with pytest.raises(openai.BadRequestError, match="multiple of"):
        client.images.generate(prompt="x", size="9x9")
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])


def test_an_error_before_the_first_piece_of_a_stream_is_no_stream(client):
    with pytest.raises(openai.BadRequestError, match="more than the context"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "license " * 500}], stream=True
        )
