"""The operating system's side of an engine: its processes, their shared memory, and their end."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from multiprocessing import parent_process
from pathlib import Path

import psutil

from .. import logs
from . import vllm_import

# What Python's multiprocessing, torch, NCCL and vLLM make there; an operator may keep other things in it.
_SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm_|sem\.mp-|torch_|nccl-|vllm)[^\s/]*")


class Footprint:
    """What a running engine takes from the system, to be given back if it dies and cannot do so itself."""

    def __init__(self) -> None:
        self.killed = False
        self._processes = _children()
        self._shared_memory = {path for process in self._processes for path in _shared_memory(process.pid)}

    @property
    def process_ids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    def remove(self) -> None:
        """End what still runs, orphans of dead processes included; takes seconds. For a thread."""
        _end([*self._processes, *_children()])
        for path in self._shared_memory:
            with contextlib.suppress(OSError):
                path.unlink()

    def kill(self) -> None:
        """End the processes at once, without a chance to say goodbye: they hang."""
        self.killed = True
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def end_children() -> None:
    """End every process that vLLM started and did not end itself, workers of its workers included."""
    _end(_children())


def _end(processes: list[psutil.Process]) -> None:
    for signal_them in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                signal_them(process)
        _, processes = psutil.wait_procs(processes, timeout=3)


def _children() -> list[psutil.Process]:
    """All below this process but Python's resource tracker, which cleans up after them in the end."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not any("resource_tracker" in argument for argument in process.cmdline()):
                found.append(process)
    return found


def _shared_memory(pid: int) -> set[Path]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf8")
    except OSError:
        return set()
    return {Path(path) for path in _SHARED_MEMORY.findall(maps)}


def enter() -> logging.Handler:
    """Called in each of vLLM's processes, once it is imported: `logging.json`, which they read, names it."""
    vllm_import.end()
    _end_with_parent()
    return logs.engine_handler()


def _end_with_parent() -> None:
    """A killed server cannot end its engine, which would hold the GPU for ever: so the engine watches.

    (PR_SET_PDEATHSIG would not do: it fires when the *thread* ends that started the process.)
    """
    if (parent := parent_process()) is None:
        return  # this is the server itself
    os.setpgid(0, 0)  # Ctrl-C in a terminal is for the server, which lets the engine finish

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
