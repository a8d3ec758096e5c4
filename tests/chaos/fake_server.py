"""The server with the tests' fake engine: `python -m tests.chaos.fake_server '{"server": {"port": 0}}'`."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from gemma_serve import server
from gemma_serve.engine.base import GenerationRequest, Usage
from gemma_serve.settings import Settings

from ..fake_engine import FakeEngine

logger = logging.getLogger("gemma_serve")


class Engine(FakeEngine):
    """Answers completions at once and chats never."""

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        if request.kind == "chat":
            logger.info("at work")
            await self.hang()
        return await super().complete(request)


if __name__ == "__main__":
    server.run(Settings(model={"name": "gemma-demo"}, **json.loads(sys.argv[1])), Engine())
