"""Check that the machine can run gemma_serve; install the system packages that it lacks."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence  # noqa: UP035  # older Pythons run this

ENGINES = ("cpu", "cuda")
DISK_GB = {"cpu": 5, "cuda": 12}
GLIBC_MIN = (2, 34)  # the newest that a locked wheel asks for (cryptography)
NVIDIA_DRIVER_MIN = 580  # CUDA 13, which the locked torch is built for

# (program, Debian package): what the tests run besides Python.
DEV_APT: tuple[tuple[str, str], ...] = (
    ("haproxy", "haproxy"),
    ("nginx", "nginx"),
    ("prometheus", "prometheus"),
    ("redis-server", "redis-server"),
)
# What they can do without, and what is skipped then.
OPTIONAL_APT: tuple[tuple[str, str, str], ...] = (
    ("chromium", "chromium", "the tests of the chat page in a browser"),
)


class SetupError(Exception):
    """What failed and what to do about it, in words for the user."""


class Need(NamedTuple):
    """Something the system lacks, and the Debian package that has it."""

    what: str
    package: str


def say(text: str) -> None:
    print(text, flush=True)


def preflight(engine: str, dev: bool, log: Path, fill: Path | None) -> None:
    """Check the machine; install missing system packages where that is possible, or name them all.

    `fill` is the folder that takes a whole new installation, None where there is one already.
    """
    problems = blockers(engine, fill)
    needs = missing(engine, dev)
    if needs and not problems and os.geteuid() == 0 and shutil.which("apt-get"):
        with without_services([need.package for need in needs if need in DEV_APT]):
            apt_install(sorted({need.package for need in needs}), log)
        needs = missing(engine, dev)
    problems += [f"{need.what} is missing: apt-get install -y {need.package}" for need in needs]
    if problems:
        hint = " (apt-get needs root, or sudo before it)" if needs else ""
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise SetupError(f"this machine is not ready{hint}:{listing}")
    if engine == "cpu" and not shutil.which("g++"):
        say("Note: no C++ compiler. The demo runs without; `enforce_eager: false` needs g++.")
    if dev:
        add_optional(log)


def blockers(engine: str, fill: Path | None) -> list[str]:
    """What no package can mend, one sentence each."""
    checks = [_platform_problem(engine), _glibc_problem()]
    checks.append(_avx2_problem() if engine == "cpu" else _driver_problem())
    checks.append(_disk_problem(engine, fill) if fill else "")
    return [problem for problem in checks if problem]


def _platform_problem(engine: str) -> str:
    machines = ("x86_64", "aarch64") if engine == "cpu" else ("x86_64",)
    if sys.platform == "linux" and platform.machine() in machines:
        return ""
    here = f"{sys.platform} {platform.machine()}"
    return f"the {engine} engine runs on Linux {' or '.join(machines)}; this is {here}"


def _glibc_problem() -> str:
    needed = f"glibc {GLIBC_MIN[0]}.{GLIBC_MIN[1]} or newer is needed (Debian 12, Ubuntu 22.04, RHEL 9)"
    try:
        version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1]
        recent = tuple(map(int, version.split(".")[:2])) >= GLIBC_MIN
    except (ValueError, OSError, IndexError):
        return f"{needed}; this system has another C library"
    return "" if recent else f"{needed}; this is {version}"


def _avx2_problem() -> str:
    if platform.machine() != "x86_64":
        return ""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return "" if re.search(r"\bavx2\b", cpu) else "the CPU has no AVX2, which vLLM needs"


def _driver_problem() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\s(\d{3,})\.\d+", text)
    if found is None or int(found.group(1)) >= NVIDIA_DRIVER_MIN:
        return ""
    return (
        f"NVIDIA driver {found.group(1)} is too old for CUDA 13: update it to {NVIDIA_DRIVER_MIN} or newer, "
        "or set GEMMA_SETUP=cpu"
    )


def _disk_problem(engine: str, fill: Path) -> str:
    free = shutil.disk_usage(fill).free / 1e9
    if free >= DISK_GB[engine]:
        return ""
    return f"{free:.1f} GB are free in {fill}; the {engine} engine needs {DISK_GB[engine]} GB"


def missing(engine: str, dev: bool) -> list[Need]:
    """The system packages that are not there."""
    importlib.invalidate_caches()
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    needs = []
    if not importlib.util.find_spec("ensurepip") or not importlib.util.find_spec("venv"):
        needs.append(Need("Python's venv", f"{python}-venv"))
    if not _has_library("libnuma.so.1"):
        needs.append(Need("libnuma", "libnuma1"))
    if engine == "cuda":  # Triton compiles its launchers with them, also without torch.compile
        if not shutil.which("gcc"):
            needs.append(Need("a C compiler", "build-essential"))
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            needs.append(Need("Python.h", f"{python}-dev"))
    if dev:
        needs += [Need(program, package) for program, package in DEV_APT if not shutil.which(program)]
    return needs


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def add_optional(log: Path) -> None:
    """Install what the tests can do without, or say what is skipped for it."""
    for program, package, skipped in OPTIONAL_APT:
        if shutil.which(program):
            continue
        if os.geteuid() == 0 and shutil.which("apt-get") and not _is_ubuntu():
            with contextlib.suppress(SetupError):
                apt_install([package], log)
        if not shutil.which(program):
            say(f"Note: no {program}, so {skipped} are skipped: apt-get install -y {package}, on Debian")


def _is_ubuntu() -> bool:
    """Its browsers are snaps: the packages of that name fetch those, which no container can run."""
    try:
        return re.search(r"^ID=\"?ubuntu", Path("/etc/os-release").read_text(), re.MULTILINE) is not None
    except OSError:
        return False


@contextlib.contextmanager
def without_services(packages: Sequence[str], policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """Debian starts and enables the services it installs, on all interfaces: tests want programs alone."""
    ours = bool(packages) and not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\n# For the time of gemma_serve's setup only.\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink()
        for package in packages if shutil.which("systemctl") else ():
            command = ["systemctl", "disable", package]  # one by one: not each of them is a service
            subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def apt_install(packages: Sequence[str], log: Path) -> None:
    say(f"Installing system packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300"]
    install = [*apt, "install", "-y", "--no-install-recommends", *packages]
    with log.open("ab") as output:
        for command in ([*apt, "update"], install):
            code = subprocess.call(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
    if code:
        raise SetupError(
            f"apt-get could not install {' '.join(packages)}. Install them by hand, then run this again. "
            f"Full log: {log}"
        )
