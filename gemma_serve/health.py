"""Which state the server is in, for probes and people. All of it is answered from memory."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from datetime import UTC, datetime
from typing import Any

from . import __version__
from .admission import Admission
from .cache import ResponseCache
from .clients import Quotas
from .drain import Drain
from .engine.base import Engine, EngineState
from .engine.installed import vllm_version
from .metrics import Metrics
from .models import Models
from .settings import Settings, digest
from .stats import Stats
from .storage import SharedStorage

_AWAY_SECONDS = 3.0  # one slow answer of Redis is no reason to send everybody elsewhere


class Health:
    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        models: Models,
        admission: Admission,
        drain: Drain,
        stats: Stats,
        metrics: Metrics,
        storage: SharedStorage | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self._models = models
        self._engine = engine
        self._admission = admission
        self._drain = drain
        self._stats = stats
        self._metrics = metrics
        self._storage = storage
        self._cache = cache
        security = settings.security
        # Without it who has a limit is refused; a key of the file may have one.
        limited = security.quotas != Quotas() or security.api_keys_file is not None
        self._needed = storage if storage is not None and not storage.fail_open and limited else None
        self._ready_when_full = settings.health.ready_when_full
        self._settings_digest = digest(settings)
        self._versions = {
            "gemma_serve": __version__,
            "vllm": vllm_version(),
            "torch": _version("torch"),
            "transformers": _version("transformers"),
            "python": platform.python_version(),
        }
        self._started = time.time()

    def live(self) -> bool:
        """False only when a restart of this process would help."""
        return not self._engine.status.failed

    def ready(self) -> bool:
        """Would a request sent now be served?"""
        return self._engine.status.ready and not (
            self._drain.begun or self._overloaded() or self._storage_missing()
        )

    def _storage_missing(self) -> bool:
        return self._needed is not None and self._needed.away_seconds > _AWAY_SECONDS

    def _overloaded(self) -> bool:
        return self._admission.full and not self._ready_when_full

    def summary(self) -> dict[str, Any]:
        status = self._engine.status
        if self._drain.begun:
            return {"status": "draining", "reason": f"the server ends; {self._drain.active} requests run"}
        if status.ready and self._overloaded():
            return {"status": "overloaded", "reason": f"{self._admission.waiting} requests wait"}
        if status.ready and self._storage_missing():
            return {
                "status": "storage_unavailable",
                "reason": "Redis is away, with storage.fail_open=false",
            }
        body: dict[str, Any] = {"status": str(status.state)}
        if status.phase:
            body["phase"] = status.phase
        if status.state is EngineState.LOADING and (share := self._engine.report().loaded) is not None:
            body["share"] = share
        if status.error:
            body["reason"] = status.error
        return body

    def status(self) -> dict[str, Any]:
        """What runs here, and what has happened to it."""
        status, report = self._engine.status, self._engine.report()
        device = report.device
        return {
            **self.summary(),
            "versions": self._versions,
            "started": _moment(self._started),
            "uptime_seconds": round(time.time() - self._started, 3),
            "model": self._models.summary(),
            "device": device
            and {
                "type": device.type,
                "name": device.name,
                "count": device.count,
                "cuda_available": device.cuda,
                "gpu_memory": [
                    {"used_bytes": gpu.used, "total_bytes": gpu.total} for gpu in self._stats.gpus
                ],
            },
            "engine": {
                "state": str(status.state),
                "restarts": status.restarts,
                "resumed_requests": report.resumed,
                "stalled_seconds": round(status.stalled_seconds, 3),
                "history": [
                    {
                        "time": _moment(change.time),
                        "state": str(change.state),
                        "phase": change.phase,
                        "reason": change.error,
                    }
                    for change in list(status.history)
                ],
            },
            "settings_sha256": self._settings_digest,
            "dependencies": {"redis": self._redis()},
        }

    def metrics(self) -> dict[str, Any]:
        """How busy the server is. Seconds, bytes; null is what is not known."""
        report, stats = self._engine.report(), self._stats
        return {
            "running": self._admission.running,
            "waiting": self._admission.waiting,
            "engine": {"running": report.running, "waiting": report.waiting},
            "kv_cache_use": report.kv_cache_use,
            "tokens_per_second": {
                f"{seconds}s": _rounded(stats.tokens_per_second(seconds)) for seconds in (10, 60)
            },
            "time_to_first_token_seconds": self._metrics.recent_first_token.percentiles(),
            "inter_token_seconds": self._metrics.recent_inter_token.percentiles(),
            "cache_hit_rate": self._cache and _rounded(self._cache.hit_rate, 4),
            "connections": self._metrics.active_connections(),
            "memory": {
                "rss_bytes": stats.rss_bytes,
                "gpu_bytes": sum(gpu.used for gpu in stats.gpus) if stats.gpus else None,
                "kv_cache_bytes": report.kv_cache_bytes,
            },
            "cpu_percent": stats.cpu_percent,
        }

    def _redis(self) -> str:
        if self._storage is None:
            return "not used"
        return "away" if self._storage.away else "up"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)
