"""A chat in a terminal, over the server's WebSocket: what `gemma-server chat` runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from .chat_protocol import SUBPROTOCOL
from .errors import StartupError

COMMANDS = """\
Ctrl-C stops an answer, Ctrl-D or /quit ends the chat, and

  /system TEXT    what the model is told before all else; without TEXT nothing
  /regenerate     answer the last question again
  /history        what was said so far
  /clear          forget it
  /help           these lines
"""

# What moves the cursor or rings: a model's answer must not drive the terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_PROMPT = "\n> "
_LAST = ("message", "cancelled", "error")  # of an answer


class TerminalChat:
    def __init__(self, url: str, session_id: str | None, parameters: dict[str, Any]) -> None:
        self._url = url
        self._session_id = session_id
        self._parameters = parameters
        self._connection = ExitStack()
        self._socket: ClientConnection | None = None
        self._interactive = sys.stdin.isatty()
        self._used = session_id is not None
        self._failed = False

    # --- the connection

    def open(self) -> None:
        """Connect, and go on with the session if there is one. Raises `StartupError`."""
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {}
        try:
            self._socket = self._connection.enter_context(
                connect(
                    self._url,
                    additional_headers=headers,
                    subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
                    compression=None,
                    max_size=None,
                )
            )
            first = self._recv()
        except InvalidStatus as error:
            hint = (
                " (OPENAI_API_KEY holds the key to send)" if error.response.status_code in (401, 403) else ""
            )
            told = _message(error.response.body or b"")
            raise StartupError(f"{self._url} answered {error.response.status_code}{hint}: {told}") from error
        except (OSError, InvalidURI, InvalidHandshake, ConnectionClosed, ValueError) as error:
            raise StartupError(
                f"cannot chat at {self._url}: {error}. `gemma-server serve` starts a server."
            ) from error
        if self._session_id is None:
            self._session_id = first["session_id"]
            return
        reply = self._ask("session", session_id=self._session_id)
        if reply["type"] == "error":
            raise StartupError(f"--session {self._session_id}: {reply['data']['message']}")

    def close(self) -> None:
        self._socket = None
        self._connection.close()

    def _send(self, kind: str, **data: Any) -> None:
        text = json.dumps({"type": kind, "id": kind, "data": data})
        try:
            if self._socket is None:
                self.open()
            assert self._socket is not None
            self._socket.send(text)
        except ConnectionClosed:  # for being idle, or by a restart
            self.close()
            self.open()
            assert self._socket is not None
            self._socket.send(text)

    def _recv(self) -> dict[str, Any]:
        """The next message. Raises `ConnectionClosed`."""
        assert self._socket is not None
        while True:
            message: dict[str, Any] = json.loads(self._socket.recv())
            too_late = message["type"] == "error" and message["id"] == "cancel"  # the answer had ended
            if message["type"] != "going_away" and not too_late:
                return message

    def _ask(self, kind: str, **data: Any) -> dict[str, Any]:
        self._send(kind, **data)
        return self._recv()

    # --- the chat

    def run(self) -> int:
        if self._interactive:
            print("Ctrl-C stops an answer, Ctrl-D ends the chat, /help says more.")
        while (line := self._read()) is not None:
            try:
                if not self._take(line.strip()):
                    break
            except ConnectionClosed as error:
                self.close()
                self._complain(f"the connection ended ({_reason(error)}); the next question opens another")
            except StartupError as error:
                if not self._interactive:
                    raise
                self._complain(str(error))
        if self._interactive and self._used:
            print(f"\nGo on with: gemma-server chat --session {self._session_id}")
        return 1 if self._failed and not self._interactive else 0

    def _read(self) -> str | None:
        """A line; None at the end."""
        while True:
            try:
                return input(_PROMPT if self._interactive else "")
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print("\n(Ctrl-D or /quit ends the chat)")
            except EOFError:
                return None

    def _take(self, line: str) -> bool:
        """Whether to go on."""
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[], None]] = {
            "/system": lambda: self.change("system", message=rest.strip() or None),
            "/clear": lambda: self.change("clear"),
            "/history": self._history,
            "/regenerate": lambda: self._answer("regenerate"),
            "/help": lambda: print(COMMANDS, end=""),
        }
        if line == "/quit":
            return False
        if command in commands:
            commands[command]()
        elif line.startswith("/"):
            self._complain(f"there is no {command}; /help names what there is")
        elif line:
            self._answer("chat", message=line)
        return True

    def change(self, kind: str, **data: Any) -> None:
        reply = self._ask(kind, **data)
        if reply["type"] == "error":
            self._complain(reply["data"]["message"])
        elif self._interactive:
            print("(the history is empty now)" if kind == "clear" else "(done)")

    def _history(self) -> None:
        reply = self._ask("history")
        if reply["type"] == "error":
            self._complain(reply["data"]["message"])
            return
        if system := reply["data"]["system"]:
            print(f"(system: {_printable(system)})")
        for message in reply["data"]["messages"]:
            mark = "> " if message["role"] == "user" else ""
            print(f"{mark}{_printable(message['content'])}")

    def _answer(self, kind: str, **data: Any) -> None:
        self._send(kind, **data, **self._parameters)
        self._used = True
        reply: dict[str, Any] = {"type": ""}
        stopping = False
        while reply["type"] not in _LAST:
            try:
                reply = self._recv()
                self._show(reply)
            except KeyboardInterrupt:
                if stopping or not self._interactive:
                    raise
                if reply["type"] not in _LAST:
                    stopping = True
                    self._send("cancel")

    def _show(self, reply: dict[str, Any]) -> None:
        data = reply["data"]
        match reply["type"]:
            case "token":
                print(_printable(data.get("text", "")), end="", flush=True)
            case "trimmed":
                self._note(f"the oldest {data['dropped']} messages no longer fit and were dropped")
            case "message" | "cancelled":
                print(" (stopped)" if reply["type"] == "cancelled" else "")
            case "error":
                self._complain(data["message"])

    def _complain(self, text: str) -> None:
        self._failed = True
        self._note(text)

    def _note(self, text: str) -> None:
        print(f"gemma-server: {_printable(text)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    return text.translate(_CONTROLS)


def _message(body: bytes | bytearray) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf8", "replace")


def _reason(error: ConnectionClosed) -> str:
    return f"{error.rcvd.code} {error.rcvd.reason}".strip() if error.rcvd else "without a word"
