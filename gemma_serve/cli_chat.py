"""`gemma-server chat`: its arguments."""

from __future__ import annotations

import argparse
import contextlib
import sys

from .settings import load_with_sources

_EPILOG = """\
In the chat Ctrl-C stops an answer, Ctrl-D ends the chat, and /help says more.
Questions can be piped in, one a line. OPENAI_API_KEY holds the key, where the server wants one.

examples:
  gemma-server chat
  gemma-server chat http://gpu-1:8000 --system "You are a pirate." --temperature 0.3
  gemma-server chat --session Tx8m…         go on where a chat ended
  echo "What is 2 + 3?" | gemma-server chat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "url", metavar="URL", nargs="?", help="the server; by default the one of the settings"
    )
    parser.add_argument("--config", metavar="FILE", help="the server's YAML file (GEMMA_CONFIG)")
    parser.add_argument("--session", metavar="ID", help="go on with this chat")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 for the likeliest answer")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Until the user ends it: 0, or 1 when a question that was piped in failed. Raises `StartupError`."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` editing and history
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    from .terminal_chat import TerminalChat  # the client takes a while to import

    given = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    parameters = {name: value for name, value in given.items() if value is not None}
    chat = TerminalChat(_url(options), options.session, parameters)
    try:
        chat.open()
        if options.system is not None:
            chat.change("system", message=options.system)
        return chat.run()
    finally:
        chat.close()


def _url(options: argparse.Namespace) -> str:
    url = options.url or load_with_sources(config=options.config)[0].server.local_url
    url = url.rstrip("/").removesuffix("/v1")
    url = url if "://" in url else f"http://{url}"
    return f"ws{url.removeprefix('http')}/ws" if url.startswith(("http://", "https://")) else url
