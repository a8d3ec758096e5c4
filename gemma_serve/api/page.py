"""The chat page at `/`: static files of `web/chat/`, nothing from the network, no build step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

_CHAT = Path(__file__).parent.parent / "web" / "chat"

# What a model writes is hostile. DOMPurify is the first wall, this is the second: no script but ours, no
# text that becomes markup but through DOMPurify, no image or request to anywhere else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
# Always asked for anew, a 304 as a rule: a page must not mix the modules of two versions.
_FRESH = {"Cache-Control": "no-cache"}


class _Assets(StaticFiles):
    def file_response(self, *arguments: Any, **named: Any) -> Response:
        response = super().file_response(*arguments, **named)
        response.headers.update(_FRESH)
        return response


def install(app: FastAPI) -> None:
    """Serve `/` and `/assets`."""
    app.mount("/assets", _Assets(directory=_CHAT), name="chat-assets")
    text = (_CHAT / "index.html").read_text(encoding="utf8")
    page = HTMLResponse(text, headers=_FRESH | {"Content-Security-Policy": _POLICY})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def chat() -> HTMLResponse:
        return page
