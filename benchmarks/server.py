"""A server as the benchmarks start it: wait until it answers, put load on it, read what it took."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
_PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRON = {"PYTHONPATH": os.pathsep.join(_PATHS), "VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}
"""A core is left to the client and the front end, where the engine runs on the CPU."""


class StartFailed(Exception):
    """The message is the end of the server's log."""


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    key: str
    model: str
    start_seconds: float = 0.0
    """From the start of the process to its first answer."""

    def cpu_seconds(self) -> float:
        """Of the API process."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)

    def settle(self, seconds: float = 5) -> None:
        """Until its processes rest: a worker of vLLM looks for work, on its core, a second after its last."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)

        def used() -> float:
            total = 0.0
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one
                    total += sum(process.cpu_times()[:2])
            return total

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before = used()
            time.sleep(0.2)
            if abs(used() - before) < 0.02:  # less than before: one has just ended
                return

    def mark_memory(self) -> None:
        """`growth_mb` counts from here."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak is the present size
        self._marked_mb = self._peak_mb()

    def growth_mb(self) -> float:
        """Of the API process, at its largest since `mark_memory`."""
        return self._peak_mb() - self._marked_mb

    def _peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6

    def metrics(self) -> dict[str, float]:
        """Sums of the samples of `/metrics` by name; labels of vLLM's cache_config_info as `cache:NAME`."""
        request = urllib.request.Request(f"{self.url}/metrics", headers=self._headers())
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        values: dict[str, float] = {}
        for line in lines:
            if line.startswith("#") or not line.strip():
                continue
            head, _, value = line.rpartition(" ")
            name, _, labels = head.partition("{")
            values[name] = values.get(name, 0.0) + float(value)
            if name == "vllm:cache_config_info":
                pairs = (item.partition("=") for item in labels.rstrip("}").split('",'))
                found = {f"cache:{label}": text.strip('"') for label, _, text in pairs}
                values |= {label: float(text) for label, text in found.items() if text.isdigit()}
        return values

    def wait_ready(self, log: Path, seconds: float = 600) -> None:
        """Until it answers a chat. Raises `StartFailed` when it ends before, or takes longer."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        headers = {"Content-Type": "application/json"} | self._headers()
        url = f"{self.url}/v1/chat/completions"
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            if self.process.poll() is not None:
                break
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=120):
                    self.start_seconds = time.monotonic() - began
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise StartFailed(log.read_text(errors="replace")[-20_000:])

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, key: str, model: str, log: Path, seconds: float = 600
) -> Iterator[Server]:
    """This Python with `command`, which listens on `port`. Raises `StartFailed`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | ENVIRON,
            stdout=output,
            stderr=output,
            start_new_session=True,  # whose processes are known also when this one was killed
        )
    server = Server(process, f"http://127.0.0.1:{port}", key, model)
    try:
        server.wait_ready(log, seconds)
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """And what it started: an engine that outlives its server would hold the memory of the next one."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(60)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(children, timeout=60)


@contextlib.contextmanager
def running_demo(*settings: str) -> Iterator[Server]:
    """`serve --config demo` with `settings` as `--set` takes them. Raises SystemExit if it does not start."""
    port = free_port()
    command = ["-m", "gemma_serve", "serve", "--config", "demo", "--port", str(port)]
    command += [f"--set={setting}" for setting in settings]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = Path(folder, "server.log")
        try:
            server = stack.enter_context(running(command, port, "", "gemma-demo", log))
        except StartFailed as failure:
            raise SystemExit(f"the server did not start:\n{str(failure)[-2000:]}") from None
        yield server


def end_on_signals(sentence: str) -> None:
    """Ended in any way but kill -9, a benchmark ends its server: no terminal does that for it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda *_: sys.exit(sentence))


def our_command(settings: Mapping[str, Any], port: int, key: str, config: Path) -> list[str]:
    """`gemma-server serve` with keys, limits, metrics and the access log on; writes its file to `config`."""
    security = {
        "api_keys": [key],
        "rate_limit_per_minute": 1_000_000,
        "tokens_per_minute": 1_000_000_000,
        "max_in_flight": 100_000,
        # For the metrics, which else want a key with a scope of their own.
        "public_paths": ["/", "/health", "/health/*", "/metrics"],
    }
    given = {"server": {"port": port}, "security": security, "log": {"format": "json"}, **settings}
    config.write_text(yaml.safe_dump(given))
    return ["-m", "gemma_serve", "serve", "--config", str(config)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def load(server: Server, clients: int, requests: int, tokens: int, *options: str) -> dict[str, Any]:
    """What benchmarks/stream_client.py measured, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "stream_client.py"), server.url]
    command += ["--clients", str(clients), "--requests", str(requests), "--tokens", str(tokens)]
    command += ["--key", server.key, "--model", server.model, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if result.returncode:
        raise RuntimeError(f"the load client failed:\n{result.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def round_to(value: float) -> float:
    return float(f"{value:.4g}")
