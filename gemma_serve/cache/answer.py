"""A finished answer, kept as the engine gave it: whole, or in deltas. Each form is made of the other."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from ..engine.base import Delta, Kind, Sink, StreamHead, Usage

_FINISHED = {"stop", "length", "tool_calls"}  # and not aborted
_OBJECTS = {"chat": "chat.completion", "completion": "text_completion"}
_ID_PREFIXES = {"chat": "chatcmpl", "completion": "cmpl"}
_OF_THE_BODY = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
_OF_A_CHOICE = {"index", "message", "text", "finish_reason"}
_OF_A_MESSAGE = {"role", "content", "refusal"}
_OVERHEAD = 1024  # bytes of an entry's objects, besides its content


class Run(NamedTuple):
    """Deltas of one choice that have nothing but text, one after the other."""

    choice: int
    """Its index."""
    texts: list[str]


Piece = Run | Delta


@dataclass(slots=True)
class Answer:
    """JSON bytes, made once, when the generation has ended: a hit that wants the same form is ready."""

    kind: Kind
    created: int
    model: str
    fingerprint: str | None
    usage: Usage
    whole: bytes | None = None
    """OpenAI's answer without its id and first brace, if the engine gave it whole."""
    rows: bytes | None = None
    """Its deltas as lists, if it streamed; a run of them in one."""
    finished: bool = True
    """Has every choice come to its own end?"""
    stored: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @classmethod
    def of_body(cls, kind: Kind, body: dict[str, Any]) -> Answer:
        whole = orjson.dumps({name: value for name, value in body.items() if name != "id"})[1:]
        finished = _all_ended({choice["index"]: choice.get("finish_reason") for choice in body["choices"]})
        usage = Usage.of_body(body["usage"])
        head = (kind, body["created"], body["model"], body.get("system_fingerprint"), usage)
        return cls(*head, whole=whole, finished=finished)

    @classmethod
    def of_stream(cls, kind: Kind, stream: StreamHead, pieces: Sequence[Piece]) -> Answer:
        rows = _rows(pieces)
        reasons: dict[int, str | None] = {row[0]: None for row in rows}
        reasons |= {row[0]: row[2] for row in rows if len(row) > 2 and row[2]}
        head = (kind, stream.created, stream.model, stream.fingerprint, stream.usage)
        return cls(*head, rows=orjson.dumps(rows), finished=_all_ended(reasons))

    @property
    def age(self) -> int:
        """Seconds."""
        return max(0, int(time.time() - self.stored))

    @property
    def size(self) -> int:
        """In memory, in bytes."""
        return len(self.whole or self.rows or b"") + _OVERHEAD

    def body(self, request_id: str) -> bytes:
        """The answer as OpenAI's JSON, under an id of its own: clients tell answers apart by it."""
        name = orjson.dumps(answer_id(self.kind, request_id))
        return b'{"id":%b,%b' % (name, self.whole or orjson.dumps(self._joined())[1:])

    def pieces(self) -> list[Piece]:
        """What a stream of it gives; all at once where the engine gave it whole."""
        if self.whole is None:
            rows = orjson.loads(self.rows or b"[]")
            return [Run(*row) if len(row) == 2 else Delta(*row) for row in rows]
        body = orjson.loads(b"{" + self.whole)
        extra = {name: value for name, value in body.items() if name not in _OF_THE_BODY} or None
        return [_delta(choice, extra) for choice in body["choices"]]

    def _joined(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "object": _OBJECTS[self.kind],
            "created": self.created,
            "model": self.model,
            "choices": [],
        }
        if self.fingerprint is not None:
            body["system_fingerprint"] = self.fingerprint
        choices: dict[int, dict[str, Any]] = {}
        texts: dict[int, list[str]] = {}
        for delta in self.pieces():
            index = delta.choice if isinstance(delta, Run) else delta.index
            choice = choices.setdefault(index, {"logprobs": None, "finish_reason": None})
            if isinstance(delta, Run):
                texts.setdefault(index, []).extend(delta.texts)
                continue
            texts.setdefault(index, []).append(delta.text)
            choice["finish_reason"] = delta.finish_reason or choice["finish_reason"]
            if delta.delta is not None:
                _merge(choice.setdefault("message", {}), delta.delta)
            if delta.choice is not None:
                _merge(choice, delta.choice)
            for key, value in (delta.extra or {}).items():
                if key != "usage":
                    body.setdefault(key, value)
        for index, choice in sorted(choices.items()):
            body["choices"].append({"index": index, **self._content("".join(texts[index]), choice), **choice})
        return body | {"usage": self.usage.body()}

    def _content(self, text: str, choice: dict[str, Any]) -> dict[str, Any]:
        if self.kind == "completion":
            return {"text": text}
        parts = choice.pop("message", {})
        content = parts.pop("content", "") + text
        for call in parts.get("tool_calls", ()):
            call.pop("index", None)
        return {
            "message": {"role": "assistant", "content": content or (None if parts else ""), "refusal": None}
            | parts
        }

    def encode(self) -> bytes:
        """A line that says what follows it, then the content as it is."""
        content = self.whole or self.rows or b""
        usage = [self.usage.prompt_tokens, self.usage.completion_tokens, self.usage.details]
        head = [self.kind, self.created, self.model, self.fingerprint, usage, round(self.stored, 3)]
        return orjson.dumps([*head, self.whole is not None, zlib.crc32(content)]) + b"\n" + content

    @classmethod
    def decode(cls, data: bytes) -> Answer:
        """Raises `ValueError` when it is not what `encode` gave."""
        line, _, content = data.partition(b"\n")
        try:
            kind, created, model, fingerprint, usage, stored, is_whole, checksum = orjson.loads(line)
            answer = cls(kind, created, model, fingerprint, Usage(*usage), stored=stored)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if zlib.crc32(content) != checksum:
            raise ValueError("the checksum is wrong")
        if is_whole:
            answer.whole = content
        else:
            answer.rows = content
        return answer


def answer_id(kind: Kind, request_id: str) -> str:
    """As vLLM names an answer."""
    return f"{_ID_PREFIXES[kind]}-{request_id}"


class AnswerHead:
    """The `StreamHead` of an answer that is there."""

    def __init__(self, answer: Answer, request_id: str) -> None:
        self.id = answer_id(answer.kind, request_id)
        self.created, self.model, self.fingerprint = answer.created, answer.model, answer.fingerprint
        self.usage = answer.usage


def put_pieces(sink: Sink, pieces: Iterable[Piece]) -> None:
    """Give `sink` what it has to write, without writing it."""
    for piece in pieces:
        if not isinstance(piece, Run):
            sink.put(piece)
        elif piece.choice == 0:
            sink.put_texts(piece.texts)
        else:
            for text in piece.texts:
                sink.put(Delta(piece.choice, text))


def _all_ended(reasons: Mapping[int, str | None]) -> bool:
    return bool(reasons) and _FINISHED.issuperset(reasons.values())


def _rows(pieces: Sequence[Piece]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    texts: list[str] = []
    index = None  # of the run that `texts` is
    for piece in pieces:
        if isinstance(piece, Run):
            if piece.choice != index:
                index, texts = piece.choice, []
                rows.append([index, texts])
            texts += piece.texts
        elif piece.finish_reason or piece.delta or piece.choice or piece.extra or not piece.text:
            rows.append(
                [piece.index, piece.text, piece.finish_reason, piece.delta, piece.choice, piece.extra]
            )
            index = None
        elif piece.index == index:
            texts.append(piece.text)
        else:
            index, texts = piece.index, [piece.text]
            rows.append([index, texts])
    return rows


def _delta(choice: dict[str, Any], extra: dict[str, Any] | None) -> Delta:
    message = choice.get("message") or {}
    parts = {name: value for name, value in message.items() if name not in _OF_A_MESSAGE and value}
    text = choice.get("text") or message.get("content") or ""
    if parts:
        if text:
            parts["content"], text = text, ""
        if "tool_calls" in parts:
            parts["tool_calls"] = [{"index": index, **call} for index, call in enumerate(parts["tool_calls"])]
    details = {
        name: value for name, value in choice.items() if name not in _OF_A_CHOICE and value is not None
    }
    return Delta(choice["index"], text, choice.get("finish_reason"), parts or None, details or None, extra)


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add what a later chunk says: texts and lists grow, tool calls by their index."""
    for name, value in part.items():
        known = whole.get(name)
        if name == "tool_calls":
            _merge_calls(whole.setdefault(name, []), value)
        elif isinstance(known, str) and isinstance(value, str) and name not in ("type", "id", "stop_reason"):
            whole[name] = known + value
        elif isinstance(known, list) and isinstance(value, list):
            known.extend(value)
        elif isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        else:
            whole[name] = value


def _merge_calls(calls: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    for part in parts:
        known = next((call for call in calls if call.get("index") == part.get("index")), None)
        if known is None:
            calls.append(part)
        else:
            _merge(known, part)
