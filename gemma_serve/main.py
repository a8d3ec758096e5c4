"""`uvicorn gemma_serve.main:app`, the development way: settings from the environment, `--reload` works."""

import signal
import sys

from gemma_serve import logs
from gemma_serve.app import create_app
from gemma_serve.engine.base import EngineStatus
from gemma_serve.errors import StartupError
from gemma_serve.server import refuse_workers
from gemma_serve.settings import Settings


def _end(status: EngineStatus) -> None:
    if status.failed:
        print(f"gemma_serve: {status.error}", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)


refuse_workers()
try:
    _settings = Settings.load()
    logs.configure(_settings.log.level, _settings.log.format)
    app = create_app(_settings, on_change=_end)
except StartupError as error:
    sys.exit(f"gemma_serve: {error}")
