"""The page in headless Chromium, over a tiny model behind a server of this process."""

import base64
import io
import json
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image

from dreamllm.demo.routes import POLICY, add_routes
from dreamllm.documents import chat_template
from dreamllm.inference import DrawingOptions, Engine
from dreamllm.server import EngineBackend, Started, TextPiece
from dreamllm.server.service import Served
from tests.demo.browser import EXECUTABLE, Browser
from tests.server.conftest import QUICK
from tests.server.support import IMAGES, MODEL, Scripted, data_url, encoded, serving
from tests.tiny import NUM_QUERIES, random_picture, tiny_model

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed")

EXAMPLES = {"chat": [f"![x]({data_url(encoded(random_picture(1)))})What is this?"], "pictures": ["a license"]}
IDLE = "!document.querySelector('#{}-form .go[aria-label=Stop]')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a page over a tiny model."""
    engine = Engine(*tiny_model(tmp_path_factory.mktemp("tiny")))
    backend = EngineBackend(engine)
    served = Served(MODEL, engine.processor.template, QUICK, engine.processor.settings.target_size)
    with serving(backend, served=served, add_routes=partial(add_routes, backend=backend, examples=EXAMPLES)) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, page):
    """A browser that has opened the page, and to which nothing may happen that its console complains of."""
    show(chromium, page)
    yield chromium
    assert not chromium.problems


def show(chromium, address):
    chromium.problems.clear()
    chromium.open("about:blank")
    chromium.open(f"{address.url}/")
    chromium.wait("document.body?.dataset.ready")
    settings(chromium, max_tokens=4)


def settings(browser, **values):
    for name, value in values.items():
        browser.run(f"void (document.getElementById('settings').elements['{name}'].value = {json.dumps(str(value))})")


def ask(browser, tab, text, wait=True):
    browser.run(f"document.getElementById('tab-{tab}').click()")
    form = f"document.getElementById('{tab}-form')"
    browser.run(f"void ({form}.elements.text.value = {json.dumps(text)}); {form}.requestSubmit()")
    if wait:
        browser.wait(IDLE.format(tab))


def give(browser, tab, folder, *pictures):
    """Chooses picture files in a form."""
    browser.run(f"document.getElementById('tab-{tab}').click()")
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number}.png")
        picture.save(paths[-1])
    browser.choose_files(f"#{tab}-form input[type=file]", *paths)
    browser.wait(f"document.querySelectorAll('#{tab}-form .given img').length === {len(pictures)}")


def pictures_of(browser, selector):
    urls = browser.run(f"[...document.querySelectorAll('{selector}')].map((image) => image.src)")
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_the_page_says_whose_it_is_and_what_to_try(browser):
    assert browser.run("document.title") == f"DreamLLM · {MODEL}"
    assert browser.run("document.getElementById('model').textContent") == MODEL
    assert browser.run("document.querySelector('[data-examples=chat] button').textContent") == "What is this?"
    assert browser.run("document.getElementById('settings').elements.steps.value") == str(QUICK.steps)
    browser.wait("document.getElementById('load').textContent === 'ready'")


def test_recommended_options_are_not_rounded(chromium, backend):
    recommended = DrawingOptions(steps=25, guidance_scale=1.33, scheduler="ddim", negative_prompt="blur")
    served = Served(MODEL, chat_template("plain"), recommended, 8)
    routes = partial(add_routes, backend=backend, examples={})
    with serving(backend, served=served, add_routes=routes) as address:
        show(chromium, address)
        ask(chromium, "pictures", "seven", wait=False)
        job = backend.next_job()
        job.answer(random_picture(1))
        chromium.wait(IDLE.format("pictures"))
    drawing = job.work.options.drawing
    assert replace(drawing, candidates=1) == recommended


def test_a_chat_with_pictures_both_ways(browser, page, tmp_path):
    seen = record_requests(browser)
    settings(browser, pictures="force", seed=7)
    give(browser, "chat", tmp_path, random_picture(2))
    ask(browser, "chat", "What is this?")
    (given,) = pictures_of(browser, ".from-user img")
    assert given.tobytes() == random_picture(2).tobytes()
    drawn = pictures_of(browser, ".from-model img")
    assert drawn[0].size == (8, 8)
    settings(browser, pictures="forbid")
    ask(browser, "chat", "And now?")
    first, second = seen()
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0]
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    reply = page.post("/v1/chat/completions", {**first, "stream": False, "preview_every": None}).json
    assert second["messages"][1]["content"].replace("\ufffd", "") == (
        reply["choices"][0]["message"]["content"].replace("\ufffd", "")
    )
    assert browser.run("document.querySelectorAll('.from-model').length") == 2
    assert browser.run("document.querySelectorAll('.caret').length") == 0
    browser.run("document.getElementById('anew').click()")
    assert browser.run("document.querySelectorAll('.from-model, .from-user').length") == 0


def record_requests(browser):
    """What the page sends from now on."""
    browser.run(
        "window.sent = []; window.plain ??= window.fetch; window.fetch = (path, options) => "
        "{ if (options?.body) window.sent.push(JSON.parse(options.body)); return window.plain(path, options); }; void 0"
    )
    return lambda: browser.run("window.sent")


def test_candidates_are_those_of_the_interface_and_are_seen_on_their_way(browser, page):
    settings(browser, seed=5, steps=6)
    browser.run(
        "window.previews = 0; new MutationObserver(() => { window.previews += "
        "document.querySelectorAll('.drawn.coming').length; }).observe(document.getElementById('gallery'), "
        "{ subtree: true, attributes: true, childList: true }); document.querySelector('[name=candidates]').value = 3"
    )
    ask(browser, "pictures", "seven")
    assert browser.run("window.previews") > 0
    drawn = pictures_of(browser, ".grid img")
    expected = page.post(IMAGES, {"prompt": "seven", "n": 3, "seed": 5, "steps": 6}).json["data"]
    expected = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in expected]
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in expected]
    assert "seed 5 · 6 steps" in browser.run("document.querySelector('.round .below').textContent")
    browser.run("document.querySelector('.grid img').click()")
    assert browser.run("document.getElementById('shown').open")
    browser.run("document.getElementById('shown').close()")


def test_a_document_is_written_on_with_its_pictures_in_their_places(browser, tmp_path):
    seen = record_requests(browser)
    settings(browser, pictures="force")
    give(browser, "document", tmp_path, random_picture(1), random_picture(2))
    ask(browser, "document", "One [picture 2] two")
    (sent,) = seen()
    first, second = (data_url(encoded(random_picture(seed))) for seed in (1, 2))
    assert sent["prompt"] == f"![picture]({first})One ![picture]({second}) two"  # what is not named stands first
    assert len(pictures_of(browser, "article .beginning img")) == 2
    assert len(pictures_of(browser, "article > .written img")) >= 1


def test_attention_over_what_is_read_and_what_is_drawn(browser, tmp_path):
    give(browser, "attention", tmp_path, random_picture(1))
    ask(browser, "attention", "[picture 1]license")
    assert browser.run("[...document.querySelectorAll('.look h2')].map((one) => one.textContent)") == [
        "Picture 1, as it is read", "The picture that is drawn",
    ]  # fmt: skip
    assert browser.run("document.querySelectorAll('.maps button').length") == 2 * NUM_QUERIES
    browser.run("document.querySelector('.look:last-child .maps button').click()")
    assert "of the guidance" in browser.run("document.querySelector('.look:last-child .said').textContent")
    painted = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value)"
    assert browser.run(f"[...document.querySelectorAll('canvas')].every((canvas) => {painted})")


@pytest.mark.parametrize("tab", ["chat", "pictures", "document", "attention"])
def test_a_refusal_is_shown_in_words(browser, tab):
    ask(browser, tab, "license " * 500)
    assert "more than the context of 256" in browser.run(f"document.querySelector('#{tab} .wrong').textContent")
    browser.problems[:] = [problem for problem in browser.problems if "400 (Bad Request)" not in problem]


HOSTILE = '<img src=x onerror="window.broken = 1"><script>window.broken = 1</script>'


def test_what_a_model_writes_is_text(chromium):
    backend = Scripted(lambda job: job.answer(HOSTILE, random_picture(1), HOSTILE))
    with scripted_page(backend) as address:
        show(chromium, address)
        ask(chromium, "chat", HOSTILE)
        assert (
            chromium.run("[...document.querySelectorAll('.from-model p')].map((p) => p.textContent)") == [HOSTILE] * 2
        )
        assert chromium.run("document.querySelector('.from-user p').textContent") == HOSTILE
        assert chromium.run("window.broken") is None
        assert not chromium.problems
        assert address.get("/").headers["content-security-policy"] == POLICY


def scripted_page(backend):
    return serving(backend, add_routes=partial(add_routes, backend=backend, examples={}), max_queue=0)


def test_stopping_ends_the_work_and_keeps_what_there_is(chromium, backend):
    with scripted_page(backend) as address:
        show(chromium, address)
        ask(chromium, "chat", "Write", wait=False)
        job = backend.next_job()
        job.emit(Started())
        job.emit(TextPiece("One two"))
        chromium.wait("document.querySelector('.from-model p')?.textContent === 'One two'")
        chromium.run("document.querySelector('#chat-form .go').click()")
        assert job.cancelled.wait(30)
        chromium.wait("document.querySelector('.from-model .below').textContent.includes('stopped')")


def test_a_visitor_waits_where_the_server_is_busy(chromium, backend):
    with scripted_page(backend) as address:
        show(chromium, address)
        held = [address.send("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x"}]})
                for _ in range(2)]  # fmt: skip
        jobs = [backend.next_job() for _ in held]
        ask(chromium, "chat", "Write", wait=False)
        chromium.wait("document.querySelector('.from-model .below')?.textContent.includes('busy')")
        backend._script = lambda job: job.answer("At last.")
        for job in jobs:
            job.answer("Done.")
        chromium.wait("document.querySelector('.from-model p')?.textContent === 'At last.'")
        for connection in held:
            connection.close()
        chromium.problems[:] = [problem for problem in chromium.problems if "429" not in problem]
        assert not chromium.problems


def test_the_page_needs_nothing_from_elsewhere(page):
    for name in ("page.html", "page.css", "page.js"):
        text = page.get(f"/page/{name}").body.decode()
        assert "http://" not in text
        assert "https://" not in text
    assert page.get("/page/../routes.py").status == 404
    assert page.get("/page/%2e%2e/routes.py").status == 404
