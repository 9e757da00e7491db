"""The `dreamllm` command: one function per subcommand, typed options, unknown options are errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from transformers.utils import logging as transformers_logging

from dreamkernels.version import __version__
from dreamllm.inference.command import chat, generate
from dreamllm.model.command import assemble, convert
from dreamllm.planning.command import plan
from dreamllm.profiling.command import profile
from dreamllm.recipes.command import train


@dataclass(frozen=True)
class Command:
    """`function` becomes a subcommand; its parameters named in `positional` are given without an option name."""

    function: Callable[..., object]
    positional: tuple[str, ...] = ()


COMMANDS: dict[str, Command] = {
    "train": Command(train),
    "generate": Command(generate, ("prompt",)),
    "chat": Command(chat),
    "convert": Command(convert, ("out",)),
    "assemble": Command(assemble, ("out",)),
    "profile": Command(profile),
    "plan": Command(plan),
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
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        documented = {param.arg_name: param.description for param in parse_docstring(command.function.__doc__).params}
        sub = ArgumentParser(formatter_class=_HyphenFormatter, description=_summary(command.function))
        sub.add_argument("--config", action="config", help="YAML file with the options of this command")
        sub.add_function_arguments(command.function, as_positional=False, skip=set(command.positional))
        for argument in command.positional:
            sub.add_argument(argument, type=get_type_hints(command.function)[argument], help=documented[argument])
        subcommands.add_subcommand(name, sub, help=_summary(command.function))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand. A user's mistake ends with one line on standard error and exit status 2."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    name = parsed.command
    values = _plain(parser.instantiate(parsed)[name])
    transformers_logging.disable_progress_bar()
    try:
        COMMANDS[name].function(**values)
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
    command = next((a for a in arguments if a in COMMANDS), None)
    hints = get_type_hints(COMMANDS[command].function) if command else {}
    for i, argument in enumerate(arguments):
        hint = hints.get(argument.removeprefix("--")) if argument.startswith("--") else None
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if hint is bool and following not in ("true", "false"):
            arguments[i] += "=true"
        elif hint is not None and any(get_origin(kind) in (list, Sequence) for kind in (hint, *get_args(hint))):
            arguments[i] += "" if following.startswith("[") else "+"
    return arguments


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
