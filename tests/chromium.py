"""Debian's Chromium, driven by Playwright: pages that fail a test by what they would only log."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from .conftest import ROOT

if TYPE_CHECKING:
    from playwright.async_api import Page

SCREENSHOTS = Path(os.environ.get("PAGE_SCREENSHOTS", ROOT / "build" / "screenshots"))
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def _find_chromium() -> str | None:
    """Not Ubuntu's, which is a snap: it cannot see the profile that Playwright makes for it."""
    found = shutil.which("chromium")
    return found if found and Path(found).resolve().name != "snap" else None


CHROMIUM = _find_chromium()
needs_chromium = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or CHROMIUM is None,
    reason="no browser: apt-get install -y chromium, on Debian, and make setup-dev for playwright",
)


class Faults:
    """What a page must not do: log an error, open a dialog, ask another host, break its own policy."""

    def __init__(self, page: Page, url: str) -> None:
        self.found: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Parts of messages that a test provokes."""
        here = urlsplit(url).netloc
        page.on("console", lambda message: self._add(message.text, message.type == "error"))
        page.on("pageerror", lambda error: self._add(f"uncaught: {error}"))
        page.on("request", lambda asked: self._add(f"asked {asked.url}", urlsplit(asked.url).netloc != here))

        async def dialog(opened: object) -> None:
            self._add(f"dialog: {opened}")
            await opened.dismiss()  # type: ignore[attr-defined]

        page.on("dialog", dialog)

    def _add(self, fault: str, really: bool = True) -> None:
        if really:
            self.found.append(fault)

    def check(self) -> None:
        left = [fault for fault in self.found if not any(part in fault for part in self.expected)]
        assert not left, left


@asynccontextmanager
async def opened(
    url: str, *, size: str = "desktop", dark: bool = False, path: str = "/"
) -> AsyncIterator[tuple[Page, Faults]]:
    """A fresh browser at `path` of the server; fails when the page logged an error meanwhile."""
    from playwright.async_api import async_playwright

    width, height = SIZES[size]
    async with async_playwright() as playwright:
        # --no-sandbox: CI runs as root, where Chromium's sandbox does not start.
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            context = await browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            page = await context.new_page()
            faults = Faults(page, url)
            await page.goto(url + path)
            yield page, faults
            faults.check()
        finally:
            await browser.close()


class Cable:
    """A TCP relay to the server, to be cut and mended: what a broken network is to a page."""

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._whole = True
        self._writers: set[asyncio.StreamWriter] = set()
        self.url = ""

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Cable]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self.cut()
            server.close()

    def lead_to(self, url: str) -> None:
        """Of connections from now on."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    def cut(self) -> None:
        self._whole = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._whole = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
        ends = {writer, server_writer}
        self._writers |= ends
        try:
            await asyncio.gather(_pump(reader, server_writer), _pump(server_reader, writer))
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # it is cut
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
