"""Trouble, made on purpose. `make chaos` makes more of it than CI (`CHAOS=full`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from ..conftest import until

FULL = os.environ.get("CHAOS") == "full"


async def run_out_of_memory(process: psutil.Process) -> None:
    """Leave it so little that the kernel ends it; where we may make no cgroup, end it as the kernel would."""
    if (group := _cgroup_below_ours()) is None:
        process.send_signal(signal.SIGKILL)
        return
    version_1 = group / "memory.limit_in_bytes"
    limit, events = (
        (version_1, group / "memory.oom_control")
        if version_1.exists()
        else (group / "memory.max", group / "memory.events")
    )
    try:
        limit.write_text("4096")
        (group / "cgroup.procs").write_text(str(process.pid))
        await until(lambda: "oom_kill 1" in events.read_text(), 60)
        print(f"the kernel has ended {process.pid}, which was out of memory")
    finally:
        async with asyncio.timeout(60):
            while group.exists():
                with contextlib.suppress(OSError):  # until what was in it has gone
                    group.rmdir()
                await asyncio.sleep(0.01)


def _cgroup_below_ours() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text(encoding="utf8").splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup", "memory" if controllers == "memory" else "")
        group = root / path.lstrip("/") / f"gemma-serve-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / "memory.limit_in_bytes").exists() or (group / "memory.max").exists():
                return group
            group.rmdir()
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chaos" in item.nodeid:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800 if FULL else 300))
