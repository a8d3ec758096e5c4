"""Processes that a server has started, looked at from outside."""

from __future__ import annotations

import contextlib

import psutil


def below(pid: int, title: str = "") -> list[psutil.Process]:
    """What lives below `pid`, with `title` (`EngineCore`, `Worker`) in its command line where one is given.

    Without Python's resource tracker, which stays for all of them. Any may end while it is looked at:
    vLLM asks tools like lscpu as it starts.
    """
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if title in command and "resource_tracker" not in command:
                found.append(process)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    """Each has ended; a zombie has, whoever should have waited for it."""
    return not any(_lives(process) for process in processes)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
