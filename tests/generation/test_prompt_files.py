"""`dreamllm generate --prompts`: many prompts from a file, by any number of processes, through kills."""

import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreamllm.cli import main
from dreamllm.generation.asked import Asked
from dreamllm.generation.command import generate
from dreamllm.generation.lines import read_lines
from dreamllm.generation.run import Launched
from dreamllm.inference import Assistant, DrawingOptions, GenerationOptions, drawing_defaults, load
from dreamllm.training import ConfigurationChangedError
from tests.evaluation.networks import write_clip
from tests.generation import processes
from tests.tiny import random_picture, tiny_model
from tests.training.ranks import run_in, start

ROOT = Path(__file__).parents[2]
SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    drawing = {"steps": 2, "scheduler": "ddim", "guidance_scale": 2.0}
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), drawing=drawing)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


LINES = [
    {"prompt": "Write", "pictures": "forbid"},
    {"prompt": "What is <image> this?", "images": ["shown/one.png"], "id": "mine"},
    {"prompt": "license", "draw": True, "candidates": 2, "seed": 5},
    {"prompt": "a copy of", "raw": True, "temperature": 1.5, "top_k": 5},
    {"prompt": "Draw", "pictures": "force", "max_pictures": 1},
    {"prompt": "Write", "pictures": "forbid", "max_new_tokens": 9},
    {"prompt": "Program", "draw": True, "steps": 3, "guidance_scale": 1.0},
]


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts and its picture."""
    (tmp_path / "shown").mkdir()
    random_picture(3).save(tmp_path / "shown" / "one.png")
    return write(tmp_path / "prompts.jsonl", LINES)


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def contents(out):
    """Every file of a run but its lock."""
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def test_each_line_is_answered_as_alone_in_python(folder, prompts, tmp_path):
    out = tmp_path / "out"
    generate(folder, prompts=prompts, out=out, batch_size=3, seed=10, **SHORT)
    found = records(out)
    assert [record["line"] for record in found] == list(range(1, 8))
    assert [record["seed"] for record in found] == [11, 12, 5, 14, 15, 16, 17]
    assert found[1]["id"] == "mine"
    assert "id" not in found[0]
    assistant = load(folder)
    write_four = GenerationOptions(max_new_tokens=4, pictures="forbid")
    assert found[0]["text"] == assistant.chat("Write", options=write_four).text
    shown = assistant.chat("What is <image> this?", [random_picture(3)], GenerationOptions(max_new_tokens=4, seed=12))
    assert found[1]["text"] == shown.text
    options = GenerationOptions(max_new_tokens=4, temperature=1.5, top_k=5, seed=14)
    assert found[3]["text"] == assistant.write_document("a copy of", options=options).text
    assert found[5]["tokens"] <= 9
    drawn = assistant.text_to_image("Program", 17, DrawingOptions(steps=3, scheduler="ddim", guidance_scale=1.0))
    assert Image.open(out / "pictures" / "000007-1.png").tobytes() == drawn.tobytes()


def test_pictures_lie_beside_and_are_named_in_their_places(folder, prompts, tmp_path):
    out = tmp_path / "out"
    generate(folder, prompts=prompts, out=out, **SHORT)
    found = records(out)
    assert [part["picture"] for part in found[2]["parts"]] == ["pictures/000003-1.png", "pictures/000003-2.png"]
    assert next(iter(found[4]["parts"][0])) == "picture"
    named = {part["picture"] for record in found for part in record["parts"] if "picture" in part}
    assert named == {f"pictures/{path.name}" for path in (out / "pictures").iterdir()}
    assert all(Image.open(out / name).size == (8, 8) for name in named)


def test_a_clip_model_chooses_and_the_model_words_captions(folder, tmp_path, monkeypatch):
    """As the Python calls do."""
    write_clip(tmp_path / "clip")
    clip = str(tmp_path / "clip")
    monkeypatch.setattr(Assistant, "rewritten", lambda self, requests: [f"license {request}" for request in requests])
    lines = [
        {"prompt": "a red dog", "draw": True, "candidates": 4, "select": clip, "seed": 1},
        {"prompt": "work", "draw": True, "rewrite": True, "seed": 2},
    ]
    out = tmp_path / "out"
    generate(folder, prompts=write(tmp_path / "prompts.jsonl", lines), out=out)
    assistant = load(folder)
    drawing = drawing_defaults(assistant.engine.model)
    chosen = assistant.text_to_image("a red dog", 1, replace(drawing, candidates=4, select=clip))
    worded = assistant.text_to_image("license work", 2)
    assert len(list((out / "pictures").iterdir())) == 2
    for picture, name in ((chosen, "000001-1.png"), (worded, "000002-1.png")):
        assert Image.open(out / "pictures" / name).tobytes() == picture.tobytes()


def test_neither_processes_nor_kills_change_a_byte(folder, prompts, tmp_path):
    whole, shared, killed = (tmp_path / name for name in ("whole", "shared", "killed"))
    run_in(1, processes.answer, folder, prompts, whole, logs=tmp_path / "logs")
    expected = contents(whole)
    assert {"answers.jsonl", "run.json", "groups/000003.jsonl", "pictures/000007-1.png"} <= set(expected)
    run_in(2, processes.answer, folder, prompts, shared, logs=tmp_path / "logs")
    assert contents(shared) == expected
    for groups in (0, 1):  # the second one goes on after the first, and is killed in turn
        (ended,) = start(1, processes.answer_until_killed, folder, prompts, killed, groups, logs=tmp_path / "logs")()
        assert ended.code == -signal.SIGKILL
    assert not (killed / "answers.jsonl").exists()
    assert len(list((killed / "groups").glob("*.jsonl"))) == 1
    assert list((killed / "groups").glob("*.partial"))
    (killed / "pictures" / "000007-1.png").write_bytes(b"half a picture")
    run_in(2, processes.answer, folder, prompts, killed, logs=tmp_path / "logs")
    assert contents(killed) == expected


@pytest.mark.slow
def test_the_processes_of_torchrun(folder, prompts, tmp_path):
    """As a user starts them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--model", folder, "--prompts", prompts, "--out", tmp_path / "out", "--max-new-tokens", "4"]
    command = [*torchrun, "-m", "dreamllm", "generate", *map(str, options), "--batch-size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    run_in(1, processes.answer, folder, prompts, tmp_path / "alone", logs=tmp_path / "logs")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_finished_run_loads_no_model(folder, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    generate(folder, prompts=prompts, out=out, **SHORT)
    before = contents(out)
    monkeypatch.setattr("dreamllm.generation.command.quiet_load", None)
    generate(folder, prompts=prompts, out=out, **SHORT)
    assert contents(out) == before


def test_a_folder_of_another_run_is_refused(folder, prompts, tmp_path):
    out = tmp_path / "out"
    generate(folder, prompts=prompts, out=out, **SHORT)
    before = contents(out)
    with pytest.raises(ConfigurationChangedError, match=r"temperature: 0\.0 there, 0\.5 now"):
        generate(folder, prompts=prompts, out=out, temperature=0.5, **SHORT)
    write(prompts, LINES[:3])
    with pytest.raises(ConfigurationChangedError, match="prompts: "):
        generate(folder, prompts=prompts, out=out, **SHORT)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ("[1]", "it must be an object"),
        ('{"prompt": "a", "seed": NaN}', "NaN is not a JSON number"),
        ({"prompt": "a", "colour": "red"}, "unknown key 'colour'; known: prompt, images, raw, draw"),
        ({"prompt": 5}, "prompt must be a text, not 5"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number, not True"),
        ({"prompt": "a", "steps": 1.5}, "steps must be a whole number or null, not 1.5"),
        ({"prompt": "a", "images": "one.png"}, "images must be a list of paths"),
        ({"prompt": "a", "pictures": "some"}, "pictures must be 'allow' or 'forbid' or 'force', not 'some'"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a", "draw": True, "raw": True}, "draw takes a raw caption"),
        ({"prompt": "a", "temperature": -1}, "temperature must be a finite number"),
        ({"prompt": "a", "images": ["none.png"]}, "none.png does not exist"),
        ({"prompt": "<image> <image>", "images": []}, "2 <image> placeholders but 0 pictures"),
        ({"prompt": "a", "rewrite": True}, "use it with draw"),
        ({"prompt": "a", "candidates": 2, "select": "nowhere"}, "nowhere is not a folder"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_before_anything_is_answered(folder, tmp_path, line, message):
    prompts = write(tmp_path / "prompts.jsonl", [LINES[0], "", line])
    with pytest.raises(ValueError, match="a line is wrong; --keep-going answers the others") as refused:
        generate(folder, prompts=prompts, out=tmp_path / "out", **SHORT)
    assert "\n  line 3: " in str(refused.value)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_line_that_only_the_model_refuses_is_named(folder, tmp_path):
    """What was answered before it stays."""
    prompts = write(tmp_path / "prompts.jsonl", [LINES[0], {"prompt": "word " * 500}])
    with pytest.raises(ValueError, match=r"line 2: .* more than the context of 256"):
        generate(folder, prompts=prompts, out=tmp_path / "out", batch_size=1, **SHORT)
    assert (tmp_path / "out" / "groups" / "000000.jsonl").is_file()
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_keep_going_records_what_is_wrong_and_answers_the_rest(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = [
        LINES[0],
        {"prompt": "a", "colour": 1},
        {"prompt": "word " * 500},
        {"prompt": "b", "images": ["broken.png"]},
    ]
    lines.append({"prompt": "Draw", "draw": True, "size": 7, "id": "seven"})
    prompts = write(tmp_path / "prompts.jsonl", [*lines, LINES[5]])
    generate(folder, prompts=prompts, out=tmp_path / "out", keep_going=True, **SHORT)
    found = records(tmp_path / "out")
    for record, message in zip(
        found[1:5], ("'colour'", "more than the context", "broken.png", "multiple of"), strict=True
    ):
        assert message in record["error"]
        assert "text" not in record
    assert found[4]["id"] == "seven"
    good = write(tmp_path / "good.jsonl", [LINES[0], "", "", "", "", LINES[5]])
    generate(folder, prompts=good, out=tmp_path / "good", **SHORT)
    assert [found[0], found[5]] == records(tmp_path / "good")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Write"], "not both"),
        (["--images", "a.png"], "not both"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--device", "cuda"], "has no GPU of its own"),
    ],
)
def test_mistakes(folder, prompts, tmp_path, capsys, monkeypatch, arguments, message):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        main(
            ["generate", *arguments, "--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_needs_a_folder_and_holds_something(folder, tmp_path):
    empty = write(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(ValueError, match="holds no prompts"):
        generate(folder, prompts=empty, out=tmp_path / "out")
    with pytest.raises(ValueError, match="--prompts needs --out"):
        generate(folder, prompts=empty)


def test_every_option_of_a_prompt_is_a_key_of_a_line(tmp_path):
    """And the other way round, but for a line's own name."""
    options = set(inspect.signature(generate).parameters)
    options -= {"model", "out", "device", "dtype", "int8_weights", "prompts", "batch_size", "keep_going"}
    (line,) = read_lines(write(tmp_path / "p.jsonl", [{"prompt": "a"}]), Asked())
    assert options | {"id"} == set(vars(line.asked))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert Launched(11, 16, 3).device("cuda") == "cuda:3"
    assert Launched(11, 16, 3).device("cuda:1") == "cuda:1"
    assert Launched(0, 1, 0).device("cuda") == "cuda"
