"""`python -m tests.serve_fake`: the server around a fake engine, in a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

from gemma_serve.app import create_app
from gemma_serve.settings import Settings

from .conftest import serving
from .fake_engine import FakeEngine


async def main() -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, ended.set)  # uvicorn takes the others
    settings = Settings.load(env_file=None, overrides={"model": {"name": "gemma-demo"}})
    async with serving(create_app(settings, FakeEngine())) as url:
        print(f"Listening on {url}", file=sys.stderr, flush=True)
        await ended.wait()


asyncio.run(main())
