"""uvicorn's connections with limits of their own: long heads, slow senders, readers that stop, their number.

httptools takes a head of any size, and uvicorn waits for ever for the rest of a request or for a reader who
has stopped. The application cannot mend that: it does not run yet, or it waits itself. Nor can it mend that
uvicorn begins all requests at once that come together: a probe would wait for hundreds of them.
"""

from __future__ import annotations

from typing import Any

from ..settings import ServerSettings
from ..turns import Turns
from .http import HttpProtocol
from .websocket import WebSocketProtocol


def protocols(limits: ServerSettings) -> dict[str, Any]:
    """Arguments of `uvicorn.Config`."""
    members = {"limits": limits}
    return {
        "http": type("Http", (HttpProtocol,), members | {"starts": Turns()}),
        "ws": type("WebSocket", (WebSocketProtocol,), members),
        "ws_max_size": limits.max_body_bytes,
        "ws_per_message_deflate": False,  # would gain little on tokens, and keep a window for each client
        "ws_ping_interval": limits.ping_seconds or None,
        "ws_ping_timeout": limits.write_timeout_seconds,
        "timeout_keep_alive": limits.idle_timeout_seconds,
    }
