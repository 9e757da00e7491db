"""The ways in: from Python, `dreamllm generate` and `dreamllm chat`."""

import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dreamllm.documents import REWRITING, Document, End, PictureError, Text
from dreamllm.generation.command import generate
from dreamllm.inference import Dialogue, DrawingOptions, GenerationOptions, command, load
from dreamllm.inference.terminal import UPPER_HALF, describe, half_blocks, printable
from dreamllm.model import CheckpointError
from tests.tiny import random_picture, tiny_model

QUICK = DrawingOptions(steps=2, guidance_scale=2.0, scheduler="ddim")
SHORT = GenerationOptions(max_new_tokens=5, drawing=QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(
        tmp_path_factory.mktemp("parts"), drawing={"steps": 2, "scheduler": "ddim", "guidance_scale": 2.0}
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def assistant(folder):
    return load(folder)


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "my picture.png"
    random_picture(1).save(path)
    return path


# -- Python ------------------------------------------------------------------------------------------------------------


def test_captions_of_many_pictures_are_those_of_each(assistant):
    pictures = [random_picture(i, 10 + i) for i in range(5)]
    options = GenerationOptions(max_new_tokens=5, pictures="forbid")
    together = assistant.caption_many(pictures, options)
    assert together == [assistant.caption(picture, options) for picture in pictures]
    assert all(together)


def test_drawings_of_many_captions_are_those_of_each(assistant):
    captions = ["license", "a copy of the work", "Program"]
    together = assistant.text_to_image_many(captions, [4, 5, 6], QUICK)
    for caption, seed, (picture,) in zip(captions, [4, 5, 6], together, strict=True):
        alone = assistant.text_to_image(caption, seed, QUICK)
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 1


def test_drawing_takes_the_models_options_by_default(assistant):
    assert assistant.text_to_image("license", 3).tobytes() == assistant.text_to_image("license", 3, QUICK).tobytes()


def test_candidates(assistant):
    options = DrawingOptions(steps=2, candidates=3)
    assert [len(pictures) for pictures in assistant.text_to_image_many(["a", "b"], options=options)] == [3, 3]


def test_a_chat_is_wrapped_in_the_template(assistant):
    answer = assistant.chat("What is <image> this?", [random_picture(2)], SHORT)
    raw = assistant.write_document("USER: What is <image> this? ASSISTANT:", [random_picture(2)], SHORT)
    assert answer.token_ids == raw.token_ids


def test_an_answer_is_a_chat_in_words(assistant):
    options = GenerationOptions(max_new_tokens=5, pictures="forbid")
    first = assistant.answer("What is this?", [random_picture(2)], options)
    assert first == assistant.chat("<image>What is this?", [random_picture(2)], options).text
    later = assistant.answer("What is <image> this?", [random_picture(2)], options)
    assert later == assistant.chat("What is <image> this?", [random_picture(2)], options).text
    with pytest.raises(ValueError, match="answer writes words only"):
        assistant.answer("What?", [], SHORT)


def test_a_picture_is_drawn_after_given_ones(assistant):
    """The condition is that of a chat with the pictures in their places: each of them and their order counts."""
    one, two = random_picture(3), random_picture(4)
    drawn = {}
    for name, request, pictures in [
        ("edited", "Make it blue", [one]),
        ("another", "Make it blue", [two]),
        ("composed", "Put <image> beside <image>", [one, two]),
        ("swapped", "Put <image> beside <image>", [two, one]),
    ]:
        picture = assistant.image_to_image(request, pictures, 5, QUICK)
        text = request if "<image>" in request else "<image>" + request
        forced = GenerationOptions(max_new_tokens=0, pictures="force", drawing=QUICK)
        (expected,) = assistant.engine.answers(
            [assistant.engine.processor.chat([("user", text)], pictures)], forced, [5]
        )
        assert picture.tobytes() == expected.pictures[0].tobytes()
        drawn[name] = picture.tobytes()
    assert len(set(drawn.values())) == 4


@pytest.mark.parametrize("count", [0, 3])
def test_a_picture_is_drawn_after_one_or_two(assistant, count):
    with pytest.raises(ValueError, match=f"takes one or two pictures, not {count}"):
        assistant.image_to_image("Compose", [random_picture(i) for i in range(count)])


def test_a_request_is_rewritten_before_it_is_drawn(assistant, monkeypatch):
    asked = assistant.engine.processor.chat([("user", REWRITING.format(request="a seven"))])
    wanted = assistant.engine.answer(asked, GenerationOptions(max_new_tokens=77, pictures="forbid")).text.strip()
    assert assistant.rewritten(["a seven"]) == [wanted]
    assert wanted not in ("", "a seven")
    monkeypatch.setattr(assistant, "rewritten", lambda requests: [f"license {request}" for request in requests])
    rewritten = assistant.text_to_image("work", 3, QUICK, rewrite=True)
    assert rewritten.tobytes() == assistant.text_to_image("license work", 3, QUICK).tobytes()
    assert rewritten.tobytes() != assistant.text_to_image("work", 3, QUICK).tobytes()


def test_a_request_that_becomes_nothing_is_not_drawn(assistant, monkeypatch):
    eos = assistant.engine.layout.eos
    monkeypatch.setattr("dreamllm.inference.writing.most_likely", lambda logits, bias: [eos] * len(logits))
    with pytest.raises(ValueError, match="rewrote 'a seven' into nothing; draw it as it is"):
        assistant.text_to_image("a seven", rewrite=True)
    with pytest.raises(ValueError, match="the message is empty"):
        assistant.rewritten([" "])


def test_a_dialogue_continues_with_the_answers_pictures(assistant):
    engine = assistant.engine
    dialogue = Dialogue(engine.processor.template)
    asked = dialogue.ask("Draw")
    answer = engine.answer(asked, GenerationOptions(max_new_tokens=3, pictures="force", max_pictures=1, drawing=QUICK))
    dialogue.remember(asked, answer)
    second = dialogue.ask("And?")
    turns = [("user", "Draw"), ("assistant", f"<dream>{answer.text}"), ("user", "And?")]
    expected = engine.processor.chat(turns, answer.pictures)
    ours, theirs = (engine.processor.encode(document) for document in (second, expected))
    assert ours.input_ids == theirs.input_ids
    assert ours.dream_starts == theirs.dream_starts
    assert engine.answer(second, SHORT).token_ids == engine.answer(expected, SHORT).token_ids
    dialogue.forget()
    assert dialogue.ask("Draw").parts == asked.parts


def test_the_last_turn_must_be_the_users(assistant):
    with pytest.raises(ValueError, match="the last turn of a dialogue must be the user's"):
        assistant.chat([("user", "a"), ("assistant", "b")])


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_prompts_are_refused(assistant, empty):
    for call in (assistant.write_document, assistant.text_to_image, assistant.chat, assistant.answer):
        with pytest.raises(ValueError, match="empty"):
            call(empty)


def test_a_document_holds_its_own_pictures(assistant):
    with pytest.raises(ValueError, match="a Document holds its own pictures"):
        assistant.write_document(Document((Text("a"),)), [random_picture(0)])


@pytest.mark.parametrize(
    "name",
    ["config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "model.safetensors"],
)
def test_an_incomplete_folder_names_what_is_missing(folder, tmp_path, name):
    for path in folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match=f"is incomplete; missing: {name}"):
        load(tmp_path)


def test_a_folder_without_tokenizer_data_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        if path.name not in ("tokenizer.json", "tokenizer.model"):
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match=r"is incomplete; missing: tokenizer\.json or tokenizer\.model"):
        load(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model folder .*nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, not 'float3'"):
        load(folder, dtype="float3")


def test_half_precision_draws_and_writes(folder):
    answer = load(folder, dtype="bfloat16").chat("Draw", options=GenerationOptions(max_new_tokens=3, pictures="force"))
    assert answer.pictures
    assert answer.token_ids


def test_missing_shards_of_weights_are_named(folder, tmp_path):
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).symlink_to(path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is incomplete; missing: model-1\.safetensors$"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json is not an index of weights"):
        load(tmp_path)


# -- dreamllm generate -------------------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_writes_a_page(folder, tmp_path, capsys, assistant):
    out = tmp_path / "new" / "page.html"
    answer = generate(folder, "Write", out, pictures="force", max_new_tokens=4, max_pictures=1, seed=3)
    printed = capsys.readouterr()
    assert printed.out.startswith("[picture 1] ")
    assert f"Wrote {out}" in printed.err
    page = out.read_text()
    assert "Write" in page
    assert page.count("<img") == 1
    options = GenerationOptions(max_new_tokens=4, max_pictures=1, pictures="force", seed=3)
    assert answer.token_ids == assistant.chat("Write", options=options).token_ids


def test_generate_raw_and_draw(folder, assistant, tmp_path):
    raw = generate(folder, "Write", raw=True, max_new_tokens=4, pictures="forbid")
    assert raw.token_ids == assistant.write_document("Write", options=GenerationOptions(4, pictures="forbid")).token_ids
    drawn = generate(folder, "license", tmp_path / "a.png", draw=True, seed=5, steps=3)
    expected = assistant.text_to_image("license", 5, DrawingOptions(steps=3, scheduler="ddim", guidance_scale=2.0))
    assert drawn.pictures[0].tobytes() == expected.tobytes() == Image.open(tmp_path / "a.png").tobytes()


def test_generate_numbers_several_pictures(folder, tmp_path, capsys):
    generate(folder, "license", tmp_path / "a.png", draw=True, candidates=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png"]
    assert capsys.readouterr().out == "[picture 1] [picture 2]\n"


def test_generate_shows_images_to_the_model(folder, picture_file, assistant):
    answer = generate(folder, "What?", images=[picture_file], pictures="forbid", max_new_tokens=4)
    expected = assistant.chat(
        "<image> What?", [picture_file], options=GenerationOptions(max_new_tokens=4, pictures="forbid")
    )
    assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": " "}, ValueError, "the prompt is empty"),
        ({"out": "page.pdf"}, ValueError, r"cannot tell what to write into page.pdf: its suffix must be one of \.html"),
        ({"draw": True, "raw": True}, ValueError, "draw takes a raw caption and no images"),
        ({"images": ["missing.png"]}, PictureError, "missing.png does not exist"),
        ({"prompt": "<image> and <image>", "images": ["a.png"]}, ValueError, "2 <image> placeholders but 1 pictures"),
        ({"scheduler": "euler"}, ValueError, "unknown scheduler 'euler'"),
        ({"size": 7, "pictures": "force"}, ValueError, "size must be a positive multiple of 2"),
        ({"out": "a.png", "pictures": "forbid"}, ValueError, "the answer has no picture to write into a.png"),
    ],
)
def test_generate_refuses(folder, monkeypatch, tmp_path, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        generate(**{"prompt": "Write", "model": folder, "max_new_tokens": 3} | arguments)
    assert not list(tmp_path.iterdir())


# -- dreamllm chat -----------------------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, folder, tmp_path, lines, **options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    command.chat(folder, **{"save": tmp_path / "made", "max_new_tokens": 4} | options)
    return capsys.readouterr().out


def always_draws(monkeypatch):
    """Makes every answer a picture, a word and the end."""
    wanted = itertools.cycle(["picture", "word", "end"])

    def choose(logits, bias):
        free = bias.isfinite().nonzero().flatten()
        # Of the ids that may be chosen, the end is the third, and <dream_start>, an added token, the last.
        return [int({"picture": free[-1], "word": free[100], "end": free[2]}[next(wanted)]) for _ in logits]

    monkeypatch.setattr("dreamllm.inference.writing.most_likely", choose)


def test_chat_reads_lines_until_the_input_ends(monkeypatch, capsys, folder, tmp_path):
    out = talk(monkeypatch, capsys, folder, tmp_path, ["Hello", "", "More"])
    assert out.count("(cut off: max_new_tokens was reached)") == 2


def test_chat_answers_as_python_does(monkeypatch, capsys, folder, tmp_path, picture_file, assistant):
    out = talk(monkeypatch, capsys, folder, tmp_path, [f'What is @"{picture_file}" here?'])
    expected = assistant.chat("What is <image> here?", [picture_file], GenerationOptions(max_new_tokens=4))
    assert out.splitlines()[0] == printable(expected.text)


def test_chat_puts_waiting_pictures_first(monkeypatch, capsys, folder, tmp_path, picture_file, assistant):
    out = talk(monkeypatch, capsys, folder, tmp_path, [f"/image {picture_file}", "What?"])
    expected = assistant.chat("<image> What?", [picture_file], GenerationOptions(max_new_tokens=4))
    assert out.splitlines()[1] == printable(expected.text)


def test_chat_saves_and_names_created_pictures(monkeypatch, capsys, folder, tmp_path):
    always_draws(monkeypatch)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "picture-001.png").write_text("mine")
    out = talk(monkeypatch, capsys, folder, tmp_path, ["Draw", "Again"])
    for number in (2, 3):
        path = tmp_path / "made" / f"picture-00{number}.png"
        assert f"[{path}]" in out
        assert Image.open(path).size == (8, 8)
    assert (tmp_path / "made" / "picture-001.png").read_text() == "mine"


def test_chat_shows_pictures_on_a_terminal_only(monkeypatch, capsys, folder, tmp_path):
    always_draws(monkeypatch)
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert UPPER_HALF not in talk(monkeypatch, capsys, folder, tmp_path, ["Draw"])
    assert UPPER_HALF in talk(monkeypatch, capsys, folder, tmp_path, ["Draw"], show="blocks")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert UPPER_HALF in talk(monkeypatch, capsys, folder, tmp_path, ["Draw"])
    assert UPPER_HALF not in talk(monkeypatch, capsys, folder, tmp_path, ["Draw"], show="none")
    monkeypatch.delenv("COLORTERM")
    assert UPPER_HALF not in talk(monkeypatch, capsys, folder, tmp_path, ["Draw"])


def test_chat_survives_mistakes(monkeypatch, capsys, folder, tmp_path):
    lines = ["@missing.png", "/image", "/image missing.png", "/what", "/help", "word " * 500, "a <image> b", "Hello"]
    out = talk(monkeypatch, capsys, folder, tmp_path, lines)
    assert out.count("missing.png does not exist") == 2
    assert "Name a file: /image FILE" in out
    assert "Unknown command /what" in out
    assert "more than the context of 256" in out
    assert "write @FILE where the picture stands" in out
    assert out.rstrip().endswith("(cut off: max_new_tokens was reached)")


def test_chat_starts_anew(monkeypatch, capsys, folder, tmp_path):
    out = talk(monkeypatch, capsys, folder, tmp_path, ["Hello", "/new", "Hello", "/quit", "Hello"])
    first, *_, again, _ = out.splitlines()
    assert first == again
    assert out.count("cut off") == 2


def test_an_interrupt_leaves_quietly(monkeypatch, capsys, folder, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    command.chat(folder, save=tmp_path)
    assert capsys.readouterr().out == ""


def test_a_piped_chat_ends_with_the_pipe(folder, tmp_path):
    call = f"chat(Path({str(folder)!r}), max_new_tokens=2)"
    code = f"from pathlib import Path; from dreamllm.inference.command import chat; {call}"
    run = subprocess.run(
        [sys.executable, "-c", code], input="Hello\n", capture_output=True, text=True, timeout=120, check=True
    )
    assert "cut off" in run.stdout
    assert "Traceback" not in run.stderr


# -- the terminal ------------------------------------------------------------------------------------------------------


def test_half_blocks_show_two_pixels_per_cell():
    image = Image.new("RGB", (24, 2), (255, 0, 0))
    image.paste((0, 0, 255), (0, 1, 24, 2))
    shown = half_blocks(image, 80)
    assert shown.count(UPPER_HALF) == 24
    assert shown.startswith("\033[38;2;255;0;0m\033[48;2;0;0;255m")
    assert shown.endswith("\033[0m")


@pytest.mark.parametrize(("size", "columns", "width", "lines"), [((8, 8), 80, 24, 12), ((200, 99), 40, 40, 10)])
def test_half_blocks_fit_the_terminal(size, columns, width, lines):
    rows = half_blocks(Image.new("L", size), columns).split("\n")
    assert len(rows) == lines
    assert all(row.count(UPPER_HALF) == width for row in rows)


def test_text_cannot_drive_the_terminal():
    assert printable("a\x1b[2Jb\tc\n") == "a\ufffd[2Jb\tc\n"
    assert describe(Document((Text("a\x07"), End())), []) == "a\ufffd"


def test_the_models_drawing_options_travel_with_its_folder(folder):
    assert json.loads((folder / "config.json").read_text())["drawing"]["scheduler"] == "ddim"
