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
                headers = [*message.get("headers", ()), *_ALWAYS]
                if _is_page(headers):
                    headers.append(_PAGE_POLICY)
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _is_page(headers: list[tuple[bytes, bytes]]) -> bool:
    """Without a policy of its own."""
    for name, value in headers:
        if name.lower() == b"content-type":
            return value.startswith(b"text/html") and _PAGE_POLICY[0] not in (
                name.lower() for name, _ in headers
            )
    return False
