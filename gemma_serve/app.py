"""`create_app`: the settings and an engine in, an ASGI application out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from . import __version__
from .admission import Admission
from .api import blocks as blocks_api
from .api import cache as cache_api
from .api import docs, generate, page, relay, usage
from .api import health as health_api
from .api import metrics as metrics_api
from .api import models as models_api
from .api import version as version_api
from .api import ws as ws_api
from .api.schemas import AdapterBody, ChatCompletionBody, CompletionBody
from .api.streaming import ClientDisconnected
from .api.ws_request import MessageRequests
from .api_keys import ApiKeys
from .blocks import Blocks
from .cache import ResponseCache
from .cached_generation import CachedGenerator
from .collector import ServerCollector
from .connections import Connections
from .drain import Drain
from .engine.base import Engine, EngineStatus
from .engine.lifecycle import VLLMEngine
from .engine.switch import EngineSwitch
from .errors import BY_STATUS, InvalidRequest, ServeError
from .generation import Generator
from .health import Health
from .metrics import Metrics
from .middleware.api_keys import Authentication
from .middleware.body_limit import BodyLimit
from .middleware.cors import CORS
from .middleware.drain import DrainRequests
from .middleware.metrics import RequestMetrics
from .middleware.policy import Policy
from .middleware.rate_limit import RateLimit
from .middleware.request_log import RequestLog
from .middleware.security_headers import SecurityHeaders
from .middleware.tracing import RequestTraces
from .middleware.trusted_host import TrustedHost
from .middleware.unexpected_error import UnexpectedError
from .models import Models
from .rate_limit import RateLimiter
from .sessions import Sessions
from .settings import Settings
from .stats import Stats
from .storage import SharedStorage
from .tracing import Tracing

logger = logging.getLogger(__name__)

_DESCRIPTION = "OpenAI-compatible API for Google's Gemma models, on vLLM."


_EXPOSED_HEADERS = ["X-Request-Id", "Retry-After", "X-Cache", "Age"] + [
    f"x-ratelimit-{what}-{kind}"
    for kind in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
]


def create_app(
    settings: Settings,
    engine: Engine | None = None,
    *,
    drain: Drain | None = None,
    on_change: Callable[[EngineStatus], None] = lambda status: None,
    make_engine: Callable[[Settings], Engine] = VLLMEngine,
) -> FastAPI:
    """The application. `on_change` hears of every change of the engine's state, from whichever thread.

    `engine` runs the first model, where it is given; `make_engine` makes those of the others.
    """
    given = [engine] if engine is not None else []
    switch = EngineSwitch(settings, lambda wanted: given.pop() if given else make_engine(wanted))
    models = Models(settings, switch)
    admission = Admission(settings.queue, switch.capacity, lambda: not switch.status.ready)
    metrics = Metrics()
    drain = drain or Drain()
    keys = ApiKeys(settings.security)
    storage = SharedStorage(settings.storage) if settings.storage.url else None
    cache = ResponseCache(settings.cache, storage) if settings.cache.enabled else None
    generator = (
        Generator(switch, models, admission, metrics)
        if cache is None
        else CachedGenerator(switch, models, admission, metrics, cache)
    )
    blocks = Blocks(settings.security, storage)
    limiter = RateLimiter(settings, storage, lambda client: blocks.strike(client.id, "limit"))
    connections = Connections(settings.chat)
    drain.on_refusing.append(connections.go_away)
    drain.on_overdue.append(connections.give_up)
    otel = settings.otel
    tracing = (
        Tracing(otel.url, otel.sample_ratio, otel.service_name, __version__) if otel.url is not None else None
    )
    requests = MessageRequests(limiter, drain, tracing)
    sessions = Sessions(settings.chat, storage)
    chats = ws_api.Chats(settings, generator, models, sessions, connections, requests)
    stats = Stats(switch, admission, settings.log.stats_interval_seconds, cache)
    metrics.registry.register(ServerCollector(switch, admission, drain, limiter, blocks, stats, cache))
    health = Health(settings, switch, models, admission, drain, stats, metrics, storage, cache)

    def log_change(status: EngineStatus) -> None:
        level = logging.CRITICAL if status.failed else logging.INFO
        words = [str(status.state), *filter(None, (status.phase, status.error))]
        logger.log(level, "%s: %s", models.default, ", ".join(words))
        on_change(status)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def changed(status: EngineStatus) -> None:
            log_change(status)
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(models.moved)

        switch.status.on_change = changed
        async with contextlib.AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(tracing.aclose)
            if storage is not None:
                stack.push_async_callback(storage.aclose)
            await stack.enter_async_context(keys.watched())
            await stack.enter_async_context(limiter.running())
            await stack.enter_async_context(blocks.shared())
            await stack.enter_async_context(connections.swept())
            if cache is not None:
                stack.push_async_callback(cache.aclose)
            stack.push_async_callback(models.changes.stop)
            await switch.start()
            await stack.enter_async_context(stats.running())
            yield

    app = FastAPI(
        title="gemma_serve",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware(settings, metrics, drain, keys, blocks, limiter, tracing),
    )
    app.state.admission = admission
    app.state.cache = cache
    # First what is asked most: each route is looked at in turn.
    app.include_router(generate.router(generator, models, settings))
    app.include_router(health_api.router(health))
    app.include_router(relay.router(generator, models, settings))
    app.include_router(models_api.router(models, settings.limits.max_json_depth))
    app.include_router(usage.router(limiter))
    app.include_router(blocks_api.router(blocks))
    app.include_router(cache_api.router(cache, models))
    app.include_router(metrics_api.router(metrics.registry))
    app.include_router(version_api.router())
    app.router.routes.append(WebSocketRoute("/ws", chats))
    docs.install(app, [AdapterBody, ChatCompletionBody, CompletionBody])
    if settings.server.ui_enabled:
        page.install(app)
    app.add_exception_handler(ServeError, _render_error)
    app.add_exception_handler(HTTPException, _render_http_error)
    app.add_exception_handler(RequestValidationError, _render_wrong_query)
    app.add_exception_handler(ClientDisconnected, _render_nothing)
    app.add_exception_handler(ClientDisconnect, _render_nothing)  # starlette's, while it reads the body
    return app


def middleware(
    settings: Settings,
    metrics: Metrics,
    drain: Drain,
    keys: ApiKeys,
    blocks: Blocks,
    limiter: RateLimiter,
    tracing: Tracing | None = None,
) -> list[Middleware]:
    """Every middleware, outermost first: the only place that orders them."""
    security = settings.security
    policy = Policy(security.public_paths)
    return [
        Middleware(ProxyHeadersMiddleware, trusted_hosts=list(security.trusted_proxies)),
        Middleware(RequestLog),
        *([] if tracing is None else [Middleware(RequestTraces, tracing=tracing)]),
        Middleware(RequestMetrics, metrics=metrics),
        Middleware(UnexpectedError),
        Middleware(SecurityHeaders),
        Middleware(DrainRequests, drain=drain),
        Middleware(
            CORS,
            allow_origins=security.allowed_origins,
            allow_methods=security.allowed_methods,
            allow_headers=security.allowed_headers,
            allow_credentials=security.allow_credentials,
            expose_headers=_EXPOSED_HEADERS,
        ),
        Middleware(TrustedHost, hosts=security.trusted_hosts),
        Middleware(
            Authentication,
            keys=keys,
            blocks=blocks,
            policy=policy,
            required=security.keys_required,
            quotas=security.quotas,
        ),
        Middleware(RateLimit, limiter=limiter, policy=policy),
        Middleware(BodyLimit, limit=settings.server.max_body_bytes),
    ]


async def _render_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return Response(orjson.dumps(error.body()), error.status, error.headers, "application/json")


async def _render_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    kind = BY_STATUS.get(error.status_code, InvalidRequest if error.status_code < 500 else ServeError)
    message = error.detail
    if error.status_code == 404:
        message = f"There is no {request.method} {request.url.path!r:.200} here; /docs lists what there is."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} is not allowed on {request.url.path!r:.200}; use {allowed}."
    fault = kind(message)
    body = fault.anthropic_body() if request.url.path.startswith("/v1/messages") else fault.body()
    return Response(orjson.dumps(body), error.status_code, dict(error.headers or {}), "application/json")


async def _render_wrong_query(request: Request, error: Exception) -> Response:
    """FastAPI's own check of what stands in a URL."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    param = str(fault["loc"][-1])
    message = f"Invalid value for '{param}': {str(fault['msg']).replace('Input should', 'should')}."
    return await _render_error(request, InvalidRequest(message, param=param, code="invalid_value"))


async def _render_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # never sent: the client has gone
