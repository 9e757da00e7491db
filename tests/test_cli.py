"""The `dreamllm` command as a user meets it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dreamllm.cli import COMMANDS, Group, build_parser, main, normalise
from tests.golden import reference
from tests.tiny import NUM_QUERIES, write_components

ROOT = Path(__file__).parent.parent


def failure(capsys, *arguments: str) -> str:
    """What the command prints on standard error when it ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def words_of(commands, before=()):
    """The words of every command, of groups and of those in them."""
    for name, command in commands.items():
        yield (*before, name)
        if isinstance(command, Group):
            yield from words_of(command.commands, (*before, name))


@pytest.mark.parametrize("words", [(), *words_of(COMMANDS)], ids=" ".join)
def test_help_names_every_command_and_documents_every_option(capsys, words):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert "_" not in " ".join(word for word in text.split() if word.startswith("--"))
    for inner in words_of(COMMANDS):
        assert inner[:-1] != words or inner[-1] in text
    for option in re.findall(r"(?m)^  (--[a-z.-]+) \S+\s+\((?:required|type)", text):
        pytest.fail(f"{option} has no description")


def test_convert_there_and_back(tmp_path, capsys):
    golden = ["--clip", str(reference.CLIP), "--diffusion", str(reference.DIFFUSION)]
    main(["convert", "--from-original", str(reference.CHECKPOINT), *golden, str(tmp_path / "ours")])
    main(["convert", "--to-original", str(tmp_path / "ours"), str(tmp_path / "theirs")])
    assert f"wrote {tmp_path / 'theirs'}" in capsys.readouterr().out
    ours = load_file(tmp_path / "theirs" / "model.safetensors")
    theirs = load_file(reference.CHECKPOINT / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items())


def test_assemble_with_options_of_a_configuration_file(tmp_path, capsys):
    llm, clip, diffusion = write_components(tmp_path)
    (tmp_path / "options.yaml").write_text(f"options:\n  num_dream_queries: {NUM_QUERIES}\n  template: plain\n")
    out = tmp_path / "model"
    folders = ["--llm", str(llm), "--clip", str(clip), "--diffusion", str(diffusion)]
    main(["assemble", "--config", str(tmp_path / "options.yaml"), *folders, str(out)])
    assert "M parameters" in capsys.readouterr().out
    assert load_file(out / "model.safetensors")["dream_queries"].shape == (NUM_QUERIES, 32)


def test_folder_in_the_way(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not an empty folder" in failure(capsys, "convert", "--to-original", "x", str(tmp_path / "full"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "out"], "give either --from-original DIR or --to-original DIR"),
        (["convert", "--from-original", "a", "out"], "also needs --clip DIR and --diffusion DIR"),
        (["train", "digist", "--out", "x"], "invalid choice: 'digist'"),
        (["train"], "digits"),
        (["train", "small", "--out", "x"], "required: train.small.data"),
        (["train", "digits", "--out", "x", "--data", "y"], "unrecognized arguments: --data y"),
        (["train", "small", "--out", "x", "--data", "y", "--settings.precision", "int4"], "precision"),
        (["generate", "--modle", "x", "hello"], "modle"),
        (["generate", "--model", "nowhere", "hello"], "model folder nowhere does not exist"),
        (["paint"], "paint"),
    ],
)
def test_mistakes_end_with_one_clear_message(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    text = failure(capsys, *arguments)
    assert message in text
    assert "Traceback" not in text


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="give either"):
        main(["--traceback", "convert", str(tmp_path / "out")])


@pytest.mark.parametrize("spelling", ["--from-original=a", "--from_original=a"])
def test_parser_accepts_both_spellings(spelling):
    assert parse("convert", spelling, "out").convert.from_original.name == "a"


def test_flags_and_repeated_options():
    values = parse("generate", "--model", "m", "--draw", "seven", "--images", "a.png", "--images", "b.png").generate
    assert values.draw is True
    assert values.raw is False
    assert [path.name for path in values.images] == ["a.png", "b.png"]
    assert values.prompt == "seven"
    assert parse("generate", "--model", "m", "--draw", "false", "seven").generate.draw is False


def parse(*arguments: str):
    return build_parser().parse_args(normalise(arguments))


def test_module_and_version():
    run = subprocess.run([sys.executable, "-m", "dreamllm", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("dreamllm ")


def test_without_what_it_needs_the_command_says_so(tmp_path):
    """As after installing the operators alone: a package is missing when the command starts."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['jsonargparse'] = None\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "dreamllm", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert "the package jsonargparse is not installed" in ended.stderr
    assert ".[dreamllm]" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_scikit_learn_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("dreamllm.evaluation.digits_scans.load_digits", None)
    text = failure(capsys, "train", "digits", "--out", str(tmp_path / "run"))
    assert "pip install scikit-learn" in text
