"""The form of an answer: whole, or a stream of events, JSON lines or bare text."""

from __future__ import annotations

from typing import Literal, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from ..cache import Answer, AnswerHead, Run
from ..engine.base import Kind, StreamHead
from .body import header
from .streaming import EVENT_STREAM_HEADERS, JSON_LINES_HEADERS, TEXT_HEADERS
from .writers import ChunkWriter, TextWriter, Writer

StreamForm = Literal["events", "text", "lines"]
STREAM_HEADERS: dict[StreamForm, list[tuple[bytes, bytes]]] = {
    "events": EVENT_STREAM_HEADERS,
    "text": TEXT_HEADERS,
    "lines": JSON_LINES_HEADERS,
}
_FORMS: dict[str, StreamForm] = {"text/plain": "text", "application/x-ndjson": "lines"}


def stream_form(request: Request) -> StreamForm:
    """What the client reads, by its `Accept`: JSON and events unless it takes neither.

    Who names `text/plain` beside `application/json` or `*/*` (Spring's client, jQuery's) means the JSON.
    """
    accept = header(request, b"accept")
    if accept is None:
        return "events"
    forms = [_FORMS.get(each.partition(";")[0].strip().lower()) for each in accept.split(",")]
    return forms[0] if forms[0] is not None and all(forms) else "events"


class Form(NamedTuple):
    """How one request wants its answer."""

    kind: Kind
    stream: StreamForm | None
    """None is whole."""
    answers: int
    include_usage: bool

    def writer(self, stream: StreamHead) -> Writer:
        if self.stream == "text":
            return TextWriter()
        return ChunkWriter(self.kind, stream, self.include_usage, json_lines=self.stream == "lines")

    def stored(self, answer: Answer, request_id: str) -> Response:
        """An answer that is there: of a stream the same bytes, in one piece."""
        if self.stream is None:
            return Response(answer.body(request_id), media_type="application/json")
        writer = self.writer(AnswerHead(answer, request_id))
        parts = [writer.run(*run) if isinstance(run, Run) else writer.delta(run) for run in answer.pieces()]
        response = Response(b"".join((writer.opening(self.answers), *parts, writer.ending())))
        response.raw_headers += STREAM_HEADERS[self.stream]
        return response
