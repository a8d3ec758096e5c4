"""`gemma-server`: serve, node, check, plan, keys, chat."""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from typing import Any, NoReturn

import yaml

from . import __version__, cli_chat, cli_keys, cli_plan
from .engine import vllm_import
from .errors import StartupError
from .settings import Settings, fields, load_with_sources, masked, source_of, variable_name

if multiprocessing.current_process().name != "MainProcess":
    vllm_import.begin()  # one of vLLM's, which imports the program that started it before anything else

_EPILOG = """\
A setting comes from the first of: these options, environment variables, .env, the --config file, the default.

examples:
  gemma-server serve --config demo                     the tiny model inside this package, on the CPU
  gemma-server serve --model google/gemma-3-4b-it --host 0.0.0.0
  GEMMA_ENGINE_GPU_MEMORY_UTILIZATION=0.8 gemma-server serve --set model.max_length=8192
  gemma-server check --config configs/demo.yaml        what would be used, and where each value comes from
"""

# option → (section, field); help and default come from the settings.
_SHORTCUTS = {
    "host": ("server", "host"),
    "port": ("server", "port"),
    "model": ("model", "name"),
    "served-name": ("model", "served_name"),
    "max-length": ("model", "max_length"),
    "device": ("performance", "device"),
    "log-level": ("log", "level"),
    "log-format": ("log", "format"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options))
    except StartupError as error:
        for line in str(error).splitlines():
            print(f"gemma-server: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemma-server",
        description="A production server for Google's Gemma chat models on vLLM, with OpenAI's API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gemma_serve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, run, summary in (
        ("serve", _serve, "load the model and serve it"),
        ("node", _node, "work for a server on another node, whose engine spans several"),
        ("check", _check, "print the effective settings and where each comes from; fails on a wrong one"),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary.capitalize() + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        _add_settings(command)
    plan = commands.add_parser(
        "plan",
        help="compute what fits on a GPU: weights, KV cache, how many users, which settings",
        description="Compute what fits on a GPU. Needs neither the GPU nor the weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli_plan.add_arguments(plan)
    keys = commands.add_parser(
        "keys",
        help="create, list, revoke and verify API keys; show their usage",
        description="API keys: make, show and revoke them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli_keys.add_commands(keys)
    chat = commands.add_parser(
        "chat",
        help="chat with a running server, in the terminal",
        description="Chat with a running server.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli_chat.add_arguments(chat)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    infos = {(section, field): info for section, field, info in fields()}
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file, or the name of a preset in configs/ (GEMMA_CONFIG)"
    )
    for option, key in _SHORTCUTS.items():
        info = infos[key]
        text = " ".join(str(info.description).split()).replace("%", "%%").replace("`", "'")
        parser.add_argument(
            f"--{option}",
            metavar=key[1].upper(),
            help=f"{text} [{variable_name(*key)}, default: {info.default}]",
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="any other setting, such as engine.max_num_seqs=64; may be repeated",
    )


def _load(options: argparse.Namespace) -> tuple[Settings, list[Any]]:
    overrides: dict[str, dict[str, Any]] = {}
    for option, (section, field) in _SHORTCUTS.items():
        if (value := getattr(options, option.replace("-", "_"))) is not None:
            overrides.setdefault(section, {})[field] = value
    for item in options.set:
        name, equals, value = item.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and section and field):
            raise StartupError(
                f"--set {item}: write it as section.field=value, such as engine.max_num_seqs=64"
            )
        overrides.setdefault(section, {})[field] = value
    return load_with_sources(config=options.config, overrides=overrides)


def _serve(options: argparse.Namespace) -> NoReturn:
    settings, _ = _load(options)
    from .server import run  # imports the web framework: `--help` and `check` do not need it

    run(settings)


def _node(options: argparse.Namespace) -> NoReturn:
    settings, _ = _load(options)
    from .engine.node import Node

    Node(settings).run()


def _check(options: argparse.Namespace) -> int:
    settings, sources = _load(options)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `check | head` ends quietly
    rows = [
        (
            f"{section}.{field}",
            _shown(field, getattr(getattr(settings, section), field)),
            source_of(section, field, sources),
        )
        for section, field, _ in fields()
    ]
    rows += [
        (f"engine.{name}", _shown(name, value), source_of("engine", name, sources))
        for name, value in settings.engine.items()
    ]
    rows += [
        (f"models.{name}", _shown("", listed), source_of("models", name, sources))
        for name, listed in settings.model_dump(include={"models"}, exclude_unset=True)
        .get("models", {})
        .items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, value, source in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}")
    return 0


def _shown(name: str, value: Any) -> str:
    text = yaml.safe_dump(masked(name, value), default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()
