"""Trouble, made on purpose. `make chaos` makes more of it than CI (`CHAOS=full`)."""

from __future__ import annotations

import os

import psutil
import pytest

from ..conftest import ServerProcess

FULL = os.environ.get("CHAOS") == "full"


def below(server: ServerProcess) -> list[psutil.Process]:
    """All processes that the server has started, and theirs."""
    return list(psutil.Process(server.process.pid).children(recursive=True))


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def engine_process(server: ServerProcess, name: str) -> psutil.Process:
    """The one whose title has `name`: `EngineCore`, or `Worker`."""
    for child in below(server):
        if name in child.name() or f"VLLM::{name}" in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"no process {name} below the server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chaos" in item.nodeid:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800 if FULL else 300))
