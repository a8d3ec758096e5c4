#!/usr/bin/env python3
"""Install gemma_serve into .venv: check the machine, install the locked packages, link the project.

Does nothing when .venv already matches the lock files. Standard library only; it must parse on an old
Python too, so that such a Python gets a sentence instead of a SyntaxError.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, NamedTuple, NoReturn, Sequence  # noqa: UP035  # older Pythons run this

from preflight import DEV_APT, ENGINES, OPTIONAL_APT, SetupError, preflight, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "gemma-install.json"
LOG = VENV / "install.log"
LOCKS = ROOT / "requirements"

PYTHON_MIN = (3, 11)
PYTHON_MAX = (3, 14)  # the newest that all locked packages have wheels for
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# pip settings that would put the packages somewhere else than into .venv.
PIP_MISPLACING = ("PIP_PREFIX", "PIP_ROOT", "PIP_TARGET", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")

NETWORK_ERRORS = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|name resolution|ProxyError"
    r"|SSLError|CERTIFICATE_VERIFY_FAILED|Connection (refused|reset|broken|aborted)|Network is unreachable"
    r"|IncompleteRead|Read timed out"
)


class Stamp(NamedTuple):
    """What .venv holds: digests of the environment and of each lock file, and the packages put there."""

    venv: str
    base: str = ""
    dev: str = ""
    names: tuple[str, ...] = ()


# --- what is wanted, and what is there ------------------------------------------------------------


def choose_engine() -> str:
    """The engine for this machine, "cpu" or "cuda"; GEMMA_SETUP overrides it."""
    wanted = os.environ.get("GEMMA_SETUP", "").strip().lower()
    if wanted and wanted not in ENGINES:
        raise SetupError(f"GEMMA_SETUP is {wanted!r}; it must be cpu or cuda, or unset to look for a GPU.")
    if wanted:
        return wanted
    has_driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    return "cuda" if has_driver and platform.machine() == "x86_64" else "cpu"


def lock_file(name: str) -> Path:
    return LOCKS / f"{name}.txt"


def pins(name: str) -> list[str]:
    """The requirement lines of a lock file that apply to this machine."""
    lines = (line.strip() for line in lock_file(name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#") and _applies(line)]


def _applies(line: str) -> bool:
    marker = re.search(r'platform_machine == "(\w+)"', line)
    return marker is None or marker.group(1) == platform.machine()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def wanted_stamp(engine: str) -> Stamp:
    """The stamp that a complete --dev installation for `engine` has."""
    base = _digest(Path(__file__).read_bytes(), lock_file(engine).read_bytes(), project_scripts())
    return Stamp(
        venv=_digest(engine, sys.version_info[:2], platform.machine(), str(ROOT)),
        base=base,
        dev=_digest(base, lock_file("dev").read_bytes(), DEV_APT, OPTIONAL_APT),
    )


def read_stamp() -> Stamp | None:
    """The stamp of .venv, or None where there is no complete installation to build on."""
    if not (VENV / "bin" / "python").exists():
        return None
    try:
        stamp = Stamp(**json.loads(STAMP.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return stamp._replace(names=tuple(stamp.names))


def write_stamp(stamp: Stamp) -> None:
    partial = STAMP.with_suffix(".tmp")
    partial.write_text(json.dumps(stamp._asdict()))
    partial.replace(STAMP)


def is_current(stamp: Stamp | None, wanted: Stamp, dev: bool) -> bool:
    if stamp is None or (stamp.venv, stamp.base) != (wanted.venv, wanted.base):
        return False
    return not dev or stamp.dev == wanted.dev


def project_scripts() -> dict[str, str]:
    """The console scripts that pyproject.toml declares: name -> module:function."""
    import tomllib  # not there on the old Pythons that main() turns away

    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts: dict[str, str] = tomllib.load(file)["project"]["scripts"]
    return scripts


# --- showing what happens -------------------------------------------------------------------------


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Counts one pip run: one line that updates itself on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.began = self.shown = time.monotonic()
        self.before = _installed()
        self.log_start = LOG.stat().st_size if LOG.exists() else 0
        self.terminal = sys.stdout.isatty()

    def output(self) -> str:
        """What pip has printed in this run."""
        with LOG.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def state(self) -> str:
        output = self.output()
        installing = re.search(r"^Installing collected packages: (.*)$", output, re.MULTILINE)
        if installing:
            total = installing.group(1).count(",") + 1
            return f"installing {min(_installed() - self.before, total)} of {total}"
        seen = len(re.findall(r"^(?:Collecting|Processing|Requirement already)\b", output, re.MULTILINE))
        return f"downloading {min(seen, self.total)} of {self.total}"

    def update(self) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 10):
            return
        self.shown = now
        line = f"  {self.state()}, {clock(now - self.began)}"
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def close(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def _installed() -> int:
    return sum(1 for _ in VENV.glob("lib/python3*/site-packages/*.dist-info"))


# --- pip ------------------------------------------------------------------------------------------


class Installer:
    """Brings .venv from what its stamp says to what is wanted."""

    def __init__(self, stamp: Stamp, lock: int) -> None:
        self.stamp = stamp
        self.lock = lock

    def sync(self, wanted: Stamp, engine: str, dev: bool) -> None:
        """Install, upgrade and remove packages until .venv holds exactly the pins."""
        if self.stamp.base != wanted.base:
            names = [_name(line) for line in (*pins(engine), *pins("dev"))]
            self._remove([name for name in self.stamp.names if name not in names])
            self._install_engine(engine, pins(engine))
            compile_bytecode()
            link_project()
            self._record(self.stamp._replace(base=wanted.base, dev="", names=tuple(names)))
        if dev and self.stamp.dev != wanted.dev:
            say(f"Installing {len(pins('dev'))} packages for tests and checks")
            self._pip(["install", *PIP_INSTALL, "-r", str(lock_file("dev"))], len(pins("dev")))
            self._record(self.stamp._replace(dev=wanted.dev))

    def _record(self, stamp: Stamp) -> None:
        self.stamp = stamp
        write_stamp(stamp)

    def _remove(self, names: Sequence[str]) -> None:
        if names:
            say(f"Removing {len(names)} packages that are no longer needed")
            self._pip(["uninstall", "--yes", *names], len(names))

    def _install_engine(self, engine: str, lines: Sequence[str]) -> None:
        # pip compiles on one core what it installs; compile_bytecode() does it faster.
        options = (*PIP_INSTALL, "--no-compile")
        if engine == "cpu":
            pin = next(line for line in lines if line.startswith("torch==")).split(";")[0].strip()
            say(f"Installing {pin}")
            self._install_cpu_torch(["install", *options, pin])
        say(f"Installing {len(lines)} packages")
        self._pip(["install", *options, "-r", str(lock_file(engine))], len(lines))

    def _install_cpu_torch(self, command: Sequence[str]) -> None:
        """PyPI has no CPU builds of torch. PyTorch's index is asked only for torch, and only if need be."""
        try:
            self._pip(command, 1)
        except PackageNotFound:
            self._pip([*command, "--extra-index-url", TORCH_CPU_INDEX], 1)

    def _pip(self, arguments: Sequence[str], total: int) -> None:
        """Run pip. Without the stamp, .venv counts as broken: it is away while pip changes packages."""
        STAMP.unlink()
        progress = Progress(total)
        touched = True
        try:
            code = self._call(arguments, progress)
            output = progress.output()
            touched = code == 0 or "Installing collected packages" in output
            if code:
                raise _pip_failure(output)
            touched = False
        except KeyboardInterrupt:
            touched = "Installing collected packages" in progress.output() or arguments[0] == "uninstall"
            raise
        finally:
            progress.close()
            if not touched:
                write_stamp(self.stamp)

    def _call(self, arguments: Sequence[str], progress: Progress) -> int:
        # -I: neither PYTHONPATH nor the user's site-packages count as installed.
        command = [str(VENV / "bin" / "python"), "-I", "-m", "pip", *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in PIP_MISPLACING}
        with LOG.open("ab") as log:
            # The child shares the lock: if this process is killed, the next one waits for pip to end.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock,),
            )
        try:
            while True:
                try:
                    return process.wait(timeout=0.25)
                except subprocess.TimeoutExpired:
                    progress.update()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


PIP_INSTALL = ("--no-deps", "--no-input", "--progress-bar", "off", "--disable-pip-version-check")


class PackageNotFound(SetupError):
    """The package sources answer, but lack a package."""


def _name(line: str) -> str:
    return line.split("==")[0]


def _pip_failure(output: str) -> SetupError:
    log = f"Full log: {LOG}"
    if "No space left on device" in output:
        return SetupError(f"the disk is full. Free some space, then run this again. {log}")
    if NETWORK_ERRORS.search(output):
        return SetupError(
            "the package index cannot be reached. Check the network, or the proxy and index that "
            f"`pip config list` shows, then run this again. {log}"
        )
    # pip's second way to say it, where a constraint is configured for the package too.
    absent = re.search(r"No matching distribution found for (\S+)|Cannot install (\S+) because", output)
    if absent:
        return PackageNotFound(
            f"the package index has no {absent.group(1) or absent.group(2)} for Python "
            f"{platform.python_version()} on {platform.machine()}, or a constraint forbids it. "
            f"Check what `pip config list` shows. {log}"
        )
    return SetupError(f"pip could not install the packages; the last lines of its log say why. {log}")


# --- .venv ----------------------------------------------------------------------------------------


def create_venv() -> None:
    """Make an empty .venv, whatever stood there before."""
    say("Creating .venv")
    for entry in VENV.iterdir():  # the folder itself stays: it may be a link or a mount point
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != LOG:
            entry.unlink()
    # From within a virtual environment, perhaps .venv itself: use the Python that it was made from.
    python = getattr(sys, "_base_executable", None) or sys.executable
    with LOG.open("ab") as log:
        code = subprocess.call(
            [python, "-I", "-m", "venv", str(VENV)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if code:
        raise SetupError(f"{python} could not create a virtual environment. Full log: {LOG}")


def compile_bytecode() -> None:
    """Compile what a server imports; the rest is compiled when it is used, if ever.

    Not left to the first start: with PYTHONDONTWRITEBYTECODE set, as in many containers, each start of
    each process would compile vLLM anew (20 s).
    """
    say("Compiling bytecode")
    command = [str(VENV / "bin" / "python"), "-I", "-m", "compileall", "-q", "-j", "0"]
    command += ["-x", r"/(transformers/models|testing|tests?)/", str(VENV / "lib")]
    # The exit status tells of templates and test data that are no Python: nothing is wrong then.
    subprocess.call(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def link_project() -> None:
    """Put the project on .venv's path and write its console scripts: an editable install without a build."""
    site_packages = VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site_packages / "gemma_serve.pth").write_text(f"{ROOT}\n")
    for name, target in project_scripts().items():
        module, function = target.split(":")
        script = VENV / "bin" / name
        # Through sh, as pip does it: a path on the #! line may be neither long nor hold spaces.
        script.write_text(
            f"#!/bin/sh\n'''exec' \"{VENV}/bin/python\" \"$0\" \"$@\"\n' '''\n"
            f"import sys\n\nfrom {module} import {function}\n\n"
            # vLLM's processes import the main module again.
            f'if __name__ == "__main__":\n    sys.exit({function}())\n'
        )
        script.chmod(0o755)


@contextlib.contextmanager
def exclusive() -> Iterator[int]:
    """One installation at a time; yields the lock's file descriptor."""
    # A file that may be written: NFS locks no other.
    lock = os.open(ROOT / ".venv.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another setup in this folder to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def install(dev: bool) -> None:
    """Bring .venv up to date; return at once where it is."""
    engine = choose_engine()
    wanted = wanted_stamp(engine)
    if is_current(read_stamp(), wanted, dev):
        return
    with exclusive() as lock:
        stamp = read_stamp()
        if is_current(stamp, wanted, dev):
            return
        began = time.monotonic()
        VENV.mkdir(exist_ok=True)
        LOG.write_text("")
        fresh = stamp is None or stamp.venv != wanted.venv
        say(f"Setting up gemma_serve: {engine} engine, Python {platform.python_version()}")
        preflight(engine, dev, LOG, VENV if fresh else None)
        if stamp is None or fresh:
            create_venv()
            stamp = Stamp(venv=wanted.venv)
            write_stamp(stamp)
        Installer(stamp, lock).sync(wanted, engine, dev)
        say(f"Setup done in {clock(time.monotonic() - began)}")


# --- command line ---------------------------------------------------------------------------------


def other_python() -> str | None:
    """A newer Python on PATH, for where `python3` is too old or too new."""
    versions = range(PYTHON_MAX[1], PYTHON_MIN[1] - 1, -1)
    paths = (shutil.which(f"python3.{minor}") for minor in versions)
    return next((path for path in paths if path and _runs(path)), None)


def _runs(python: str) -> bool:
    return subprocess.call([python, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def require_python() -> None:
    """Go on in a Python that the locked packages support; say so where there is none."""
    if PYTHON_MIN <= sys.version_info[:2] <= PYTHON_MAX:
        return
    python = other_python()
    if python:
        os.execv(python, [python, *sys.argv])
    low, high = (".".join(map(str, version)) for version in (PYTHON_MIN, PYTHON_MAX))
    raise SetupError(
        f"Python {low} to {high} is needed; this is {platform.python_version()} ({sys.executable}). "
        f"Install one (apt-get install -y python{low} python{low}-venv), or name one: "
        "make PYTHON=/path/to/python3"
    )


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line; returns the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        require_python()
        parser = argparse.ArgumentParser(description="Install gemma_serve into .venv.")
        parser.add_argument("--dev", action="store_true", help="add what the tests and checks need")
        install(parser.parse_args().dev)
    except KeyboardInterrupt:
        print("Setup was interrupted; run the same command to complete it.", file=sys.stderr)
        return 130
    except SetupError as error:
        print(f"Setup failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Setup failed: {error}. Full log: {LOG}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
