"""The OpenAPI document and its page at /docs, which needs nothing from the network."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from .schemas import AnthropicError, Error

_REF = "#/components/schemas/{model}"
_SWAGGER = Path(__file__).parent.parent / "web" / "swagger"


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself, because FastAPI would read it twice."""
    reference = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may fail with these, all in OpenAI's error shape."""
    return {status: {"model": Error} for status in statuses}


def _add_common(path: str, operation: dict[str, Any]) -> None:
    """What the layers above every route answer; in place of FastAPI's 422, which `app.py` makes a 400."""
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    if path.startswith("/health/"):
        operation["security"] = []
        return
    model = AnthropicError if path.startswith("/v1/messages") else Error
    schema = {"$ref": _REF.format(model=model.__name__)}
    for status, meaning in _COMMON.items():
        content = {"application/json": {"schema": schema}}
        responses.setdefault(status, {"description": meaning, "content": content})


_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_COMMON = {
    "400": "Something in the request is wrong; the message says what.",
    "401": "An API key is needed, and this is none.",
    "403": "The API key is not for this.",
    "429": "Too much; `Retry-After` says when to come back.",
    "503": "Try again later.",
}
EVENTS: dict[str, Any] = {"text/event-stream": {}}
"""Content of an answer that may be streamed."""
STREAMS = EVENTS | {"application/x-ndjson": {}, "text/plain": {}}
_ANY_OBJECT = {"type": "object", "additionalProperties": True}


def any_body(description: str) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is somebody else's to define."""
    content = {"application/json": {"schema": _ANY_OBJECT | {"description": description}}}
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Serve `/openapi.json` with the request bodies' schemas, and `/docs`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in bodies:
                schema = model.model_json_schema(ref_template=_REF)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _add_common(path, operation)
            document["components"]["securitySchemes"] = _KEYS
            document["security"] = [{name: []} for name in _KEYS]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    app.mount("/docs/assets", StaticFiles(directory=_SWAGGER), name="docs-assets")

    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{app.title} API",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    page.headers["Content-Security-Policy"] = _policy(bytes(page.body).decode())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return page


def _policy(page: str) -> str:
    """Scripts from here, and the one that FastAPI writes into the page, by its hash."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    inline = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'self'; script-src 'self' {inline}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
