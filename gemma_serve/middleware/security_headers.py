"""Headers that tell browsers to be careful with what they get from here."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
# For a page that has none of its own: everything from here, nothing inline.
_PAGE_POLICY = (
    b"content-security-policy",
    b"default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
)


class SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                message = {**message, "headers": headers + _ALWAYS}
                kinds = {name.lower(): value for name, value in headers}
                if kinds.get(b"content-type", b"").startswith(b"text/html") and _PAGE_POLICY[0] not in kinds:
                    message["headers"].append(_PAGE_POLICY)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
