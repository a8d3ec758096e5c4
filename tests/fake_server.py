"""The server around the tests' fake engine: `python -m tests.fake_server '{"server": {"port": 0}}'`.

The settings come from the environment too. A chat that says "hang" is never answered.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from gemma_serve import server
from gemma_serve.engine.base import GenerationRequest, Usage
from gemma_serve.settings import Settings

from .fake_engine import FakeEngine

logger = logging.getLogger("gemma_serve")


class Engine(FakeEngine):
    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        messages = request.body.get("messages")
        if messages and messages[-1].get("content") == "hang":
            logger.info("at work")
            await self.hang()
        return await super().complete(request)


if __name__ == "__main__":
    overrides = {"model": {"name": "gemma-demo"}} | json.loads(sys.argv[1])
    server.run(Settings.load(env_file=None, overrides=overrides), Engine())
