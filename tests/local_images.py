"""Images over HTTP, from every address of this machine."""

from __future__ import annotations

import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from PIL import Image


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


class LocalImages:
    """`hits` are the paths that were asked for; `redirect` is where all of them lead, when it is set."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        self.redirect: str | None = None
        images = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                images.hits.append(self.path)
                body = b"" if images.redirect else png("red")
                self.send_response(302 if images.redirect else 200)
                if images.redirect:
                    self.send_header("Location", images.redirect)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class DualStack(ThreadingHTTPServer):
            address_family = socket.AF_INET6

            def server_bind(self) -> None:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                super().server_bind()

        self._server = DualStack(("::", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
