"""The `dreamllm` command: one function per subcommand, typed options, unknown options are errors.

A subcommand is a function or a group of functions: `dreamllm train digits --out DIR`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from transformers.utils import logging as transformers_logging

from dreamkernels.version import __version__
from dreamllm.data.command import build, index
from dreamllm.data.latent_command import encode_latents, packing
from dreamllm.demo.command import demo
from dreamllm.evaluation.command import evaluate
from dreamllm.generation.command import generate
from dreamllm.inference.command import chat
from dreamllm.inspection.command import inspect as inspect_data
from dreamllm.model.command import assemble, convert
from dreamllm.monitoring.command import report
from dreamllm.planning.command import plan
from dreamllm.profiling.command import profile
from dreamllm.recipes import RECIPES
from dreamllm.server.command import serve
from dreamllm.training.command import merge


@dataclass(frozen=True)
class Command:
    """`function` becomes a subcommand; its parameters named in `positional` are given without an option name."""

    function: Callable[..., object]
    positional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Subcommands under a common word."""

    summary: str
    commands: Mapping[str, Command | Group]


COMMANDS: dict[str, Command | Group] = {
    "train": Group(
        "Trains a DreamLLM by a recipe. Rerun the same command to resume.",
        {**{name: Command(recipe.run) for name, recipe in RECIPES.items()}, "report": Command(report, ("run",))},
    ),
    "generate": Command(generate, ("prompt",)),
    "chat": Command(chat),
    "serve": Command(serve),
    "demo": Command(demo),
    "evaluate": Command(evaluate, ("benchmark",)),
    "convert": Command(convert, ("out",)),
    "assemble": Command(assemble, ("out",)),
    "merge": Command(merge, ("out",)),
    "profile": Command(profile),
    "plan": Command(plan),
    "data": Group(
        "Prepares training data, and looks at it.",
        {
            "index": Command(index, ("path",)),
            "inspect": Command(inspect_data, ("path",)),
            "build": Command(build, ("kind", "source", "out")),
            "encode-latents": Command(encode_latents, ("path",)),
            "packing": Command(packing, ("path",)),
        },
    ),
}

_OPTION = re.compile(r"--[a-z][a-z0-9_.+]*")


class _HyphenFormatter(DefaultHelpFormatter):
    """Shows options with hyphens; both spellings are accepted."""

    def format_help(self) -> str:
        return _OPTION.sub(lambda match: match[0].replace("_", "-"), super().format_help())


def build_parser() -> ArgumentParser:
    """The parser of all subcommands."""
    parser = ArgumentParser(
        prog="dreamllm", description="Train, use and convert DreamLLM.", formatter_class=_HyphenFormatter
    )
    parser.add_argument("--version", action="version", version=f"dreamllm {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    _add(parser, COMMANDS)
    return parser


def _add(parser: ArgumentParser, commands: Mapping[str, Command | Group]) -> None:
    subcommands = parser.add_subcommands(dest="command")
    for name, command in commands.items():
        if isinstance(command, Group):
            sub = ArgumentParser(formatter_class=_HyphenFormatter, description=command.summary)
            subcommands.add_subcommand(name, sub, help=command.summary)
            _add(sub, command.commands)  # jsonargparse wants the outer ones first
        else:
            subcommands.add_subcommand(name, _parser_of(command), help=_summary(command.function))


def _parser_of(command: Command) -> ArgumentParser:
    function = command.function
    documented = {param.arg_name: param.description for param in parse_docstring(function.__doc__).params}
    sub = ArgumentParser(formatter_class=_HyphenFormatter, description=_summary(function))
    sub.add_argument("--config", action="config", help="YAML file with the options of this command")
    sub.add_function_arguments(function, as_positional=False, skip=set(command.positional))
    for argument in command.positional:
        default = inspect.signature(function).parameters[argument].default
        optional = {} if default is inspect.Parameter.empty else {"nargs": "?", "default": default}
        sub.add_argument(argument, type=get_type_hints(function)[argument], help=documented[argument], **optional)
    return sub


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand. A user's mistake ends with one line on standard error and exit status 2."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    command, path, _ = _chosen(parsed)
    name = " ".join(path)
    transformers_logging.disable_progress_bar()
    try:
        *_, values = _chosen(parser.instantiate(parsed))  # settings check themselves
        command.function(**values)
    except (ValueError, OSError, ImportError) as error:
        if parsed.traceback:
            raise
        print(f"dreamllm {name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"dreamllm {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def normalise(argv: Sequence[str]) -> list[str]:
    """Spellings that people expect -> those of jsonargparse.

    `--from-original` is `--from_original`; `--draw` alone is `--draw=true`; `--images A --images B` makes a list.
    """
    arguments = [_with_underscores(argument) for argument in argv]
    command = _named(arguments)
    hints = get_type_hints(command.function) if command else {}
    for i, argument in enumerate(arguments):
        hint = hints.get(argument.removeprefix("--")) if argument.startswith("--") else None
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if hint is bool and following not in ("true", "false"):
            arguments[i] += "=true"
        elif hint is not None and any(get_origin(kind) in (list, Sequence) for kind in (hint, *get_args(hint))):
            arguments[i] += "" if following.startswith("[") else "+"
    return arguments


def _named(arguments: Sequence[str]) -> Command | None:
    """The command whose words stand in `arguments`."""
    commands: Mapping[str, Command | Group] = COMMANDS
    for argument in arguments:
        found = commands.get(argument)
        if isinstance(found, Command):
            return found
        commands = commands if found is None else found.commands
    return None


def _chosen(values: Namespace) -> tuple[Command, list[str], dict[str, Any]]:
    """The command that was parsed, its words and its options."""
    path: list[str] = []
    found: Command | Group = Group("", COMMANDS)
    while isinstance(found, Group):
        path.append(values["command"])
        found, values = found.commands[path[-1]], values[path[-1]]
    return found, path, _plain(values)


def _with_underscores(argument: str) -> str:
    """`--from-original=x-y` -> `--from_original=x-y`."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _plain(values: Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(values).items() if key not in ("config", "__path__")}


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]
