"""`gemma-server chat`, as a person runs it: in a terminal, and with questions piped in."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pty
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_serve import cli_chat
from gemma_serve.api_keys import digest_of
from gemma_serve.app import create_app
from gemma_serve.key_file import KeyEntry, write_keys
from gemma_serve.terminal_chat import TerminalChat

from .chat_client import chatting
from .conftest import ServerProcess, clean_environ, serving, until
from .fake_engine import FakeEngine
from .test_app import settings

KEY = "sk-terminal-0123456789abc"


async def piped(url: str, lines: str, *arguments: str, key: str = "") -> tuple[int, str, str]:
    """(exit code, output, errors)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gemma_serve", "chat", url, *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=clean_environ() | {"OPENAI_API_KEY": key},
    )  # fmt: skip
    output, errors = await asyncio.wait_for(process.communicate(lines.encode()), 60)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


class Terminal:
    def __init__(self, process: asyncio.subprocess.Process, keyboard: int) -> None:
        self.process = process
        self._keyboard = keyboard
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._keyboard, 65_536):
                self.screen += data.decode("utf8", "replace")

    async def shows(self, pattern: str) -> None:
        async with asyncio.timeout(60):
            while not re.search(pattern, self.screen):
                assert self.process.returncode is None, self.screen
                await asyncio.sleep(0.01)


@asynccontextmanager
async def terminal(url: str, *arguments: str) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gemma_serve", "chat", url, *arguments,
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=clean_environ() | {"TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = Terminal(process, ours)
    asyncio.get_running_loop().add_reader(ours, shown.read)
    try:
        yield shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)


async def test_questions_are_piped_in() -> None:
    engine = FakeEngine()
    async with serving(create_app(settings(), engine)) as url:
        code, output, errors = await piped(
            f"{url}/v1/", "Hi\n\nAnd?\n", "--temperature", "0", "--system", "x"
        )
        assert (code, output, errors) == (0, "Hello world\nHello world\n", "")
        assert engine.requests[1].body["temperature"] == 0
        assert [one["content"] for one in engine.requests[1].body["messages"]] == [
            "x",
            "Hi",
            "Hello world",
            "And?",
        ]


def test_the_server_is_the_one_of_the_settings(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("server: {host: fd00::7, port: 9000}")
    options = argparse.Namespace(url=None, config=config)
    assert cli_chat._url(options) == "ws://[fd00::7]:9000/ws"


async def test_a_chat_in_a_terminal() -> None:
    engine = FakeEngine()
    async with serving(create_app(settings(), engine)) as url, terminal(url) as chat:
        await chat.shows("> $")
        chat.type("Hi\n")
        await chat.shows("Hello world\r\n\r\n> $")
        chat.type("/system Be kind.\n")
        await chat.shows(r"\(done\)")
        engine.words = ("Good day",)
        chat.type("/regenerate\n")
        await chat.shows("Good day\r\n")
        chat.type("/history\n")
        await chat.shows(r"\(system: Be kind\.\)\r\n> Hi\r\nGood day")
        chat.type("/nonsense\n")
        await chat.shows("there is no /nonsense")
        chat.type("/clear\n")
        await chat.shows("history is empty")
        chat.type("/quit\n")
        await chat.shows(r"--session [\w-]{32}")
        assert await chat.process.wait() == 0


async def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(create_app(settings(), engine)) as url, terminal(url) as chat:
        await chat.shows("> $")
        chat.process.send_signal(signal.SIGINT)
        await chat.shows("Ctrl-D or /quit")
        chat.type("Hi\n")
        await chat.shows("Hello$")
        chat.process.send_signal(signal.SIGINT)
        await chat.shows(r"Hello \(stopped\)")
        assert engine.streams[0].closed
        engine.hang_at = None
        chat.type("Again\n")
        await chat.shows("Hello world\r\n\r\n> $")  # before that, Ctrl-D is no end
        chat.type("\x04")
        assert await asyncio.wait_for(chat.process.wait(), 30) == 0


async def test_ctrl_c_that_comes_too_late_leaves_the_chat_in_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a token is shown, or the end, and the answer has been sent to its end meanwhile."""
    engine = FakeEngine()

    class Interrupted(TerminalChat):
        at = "token"

        def _show(self, reply: dict[str, Any]) -> None:
            super()._show(reply)
            if reply["type"] == self.at:
                self.at = ""
                while not engine.streams[-1].closed:
                    time.sleep(0.001)
                raise KeyboardInterrupt

    def talk(url: str) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        chat = Interrupted(f"{url.replace('http', 'ws')}/ws", None, {})
        for number, at in enumerate(("token", "message", "")):
            chat.at = at
            engine.words = (f"{number}", " said")
            chat._take(f"question {number}")
        chat.close()

    async with serving(create_app(settings(), engine)) as url:
        async with asyncio.timeout(30):
            await asyncio.to_thread(talk, url)
    assert capsys.readouterr().out == "0 said\n1 said\n2 said\n"


async def test_a_chat_goes_on_by_its_session() -> None:
    engine = FakeEngine()
    async with serving(create_app(settings(), engine)) as url:
        async with chatting(url) as first:
            await first.ask("chat", message="Hi")
        code, output, _ = await piped(url, "/history\n", "--session", first.session_id)
        assert (code, output) == (0, "> Hi\nHello world\n")
        code, _, errors = await piped(url, "", "--session", "nowhere")
        assert code == 1
        assert "There is no such session" in errors and errors.count("\n") == 1


async def test_a_connection_that_was_closed_is_opened_again_with_its_history() -> None:
    engine = FakeEngine()
    app = create_app(settings(chat={"idle_timeout_seconds": 0.3}), engine)
    async with serving(app) as url, terminal(url) as chat:
        await chat.shows("> $")
        chat.type("Hi\n")
        await chat.shows("Hello world")
        opened = [route for route in app.router.routes if getattr(route, "path", "") == "/ws"]
        connections = opened[0].app.connections  # type: ignore[attr-defined]
        await until(lambda: len(connections) == 0)
        chat.type("And?\n")
        await chat.shows("Hello world[^$]*Hello world")
        assert [one["content"] for one in engine.requests[1].body["messages"]] == [
            "Hi",
            "Hello world",
            "And?",
        ]


async def test_what_goes_wrong_is_a_sentence(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    write_keys(keys, [KeyEntry(name="alice", sha256=digest_of(KEY).hex())])
    async with serving(create_app(settings(security={"api_keys_file": keys}), FakeEngine(fail_at=0))) as url:
        code, _, errors = await piped(url, "Hi\n", key="wrong")
        assert code == 1 and errors.count("\n") == 1
        assert "401" in errors and "OPENAI_API_KEY" in errors and "Incorrect API key" in errors
        code, _, errors = await piped(url, "Hi\n", key=KEY)
        assert (code, errors) == (1, "gemma-server: the fake engine failed\n")
        assert KEY not in errors
    for wrong in (url, "ftp://127.0.0.1", "http://127.0.0.1:1/v1"):
        code, _, errors = await piped(wrong, "Hi\n")
        assert code == 1 and errors.count("\n") == 1 and "Traceback" not in errors
        assert "gemma-server serve" in errors


async def test_an_answer_does_not_drive_the_terminal() -> None:
    words = ("a\x1b[2Jb", "\x07\u009b", "c\r\n")
    async with serving(create_app(settings(), FakeEngine(words))) as url:
        _, output, _ = await piped(url, "Hi\n")
    assert output == "a\ufffd[2Jb\ufffd\ufffdc\ufffd\n\n"


async def test_with_the_real_server(live: ServerProcess) -> None:
    code, output, errors = await piped(live.url, "Hello!\n/regenerate\n", "--max-tokens", "8")
    assert (code, errors) == (0, "")
    assert output.count("\n") >= 2
