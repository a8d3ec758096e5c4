#!/usr/bin/env python3
"""Write the lock files and gemma_serve/engine_fields.py from pyproject.toml: `make lock`.

Resolves with a current pip in a temporary virtual environment, which also runs the second half of this
file: pip carries the `packaging` library. Only metadata is downloaded where the index allows it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
ENGINE_FIELDS = ROOT / "gemma_serve" / "engine_fields.py"

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = {"cpu": ("x86_64", "aarch64"), "cuda": ("x86_64",)}

# The index has CUDA builds of these; beside a CPU build of torch they break `import transformers`.
# triton (1 GB) has no CPU backend; vLLM and xgrammar do without.
LEFT_OUT_OF_CPU = frozenset({"torchvision", "torchaudio", "torchcodec", "triton"})

HEADER = """\
# Made by `make lock` from pyproject.toml; do not edit.
# {what}
"""
WHAT = {
    "cpu": "The project and the `cpu` extra, for Linux on x86_64 and aarch64, without the torch add-ons that"
    "\n# come only as CUDA builds. Complete: install with `pip install --no-deps`.",
    "cuda": "The project and the `cuda` extra, for Linux on x86_64."
    "\n# Complete: install with `pip install --no-deps`.",
    "dev": "What the `dev` extra adds to cpu.txt or cuda.txt."
    "\n# Complete beside one of them: install with `pip install --no-deps`.",
}


class LockError(Exception):
    """What failed and what to do about it."""


class Package(NamedTuple):
    """One resolved package: its version and its own requirements."""

    version: str
    requires: tuple[str, ...]


Resolved = Mapping[str, Package]


# --- resolving: runs in the temporary environment -------------------------------------------------


def environments(engine: str) -> list[dict[str, str]]:
    """Every Python and machine that a lock file is for, as marker variables."""
    return [
        {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
        for python, machine in product(PYTHONS, MACHINES[engine])
    ]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(requirements: Iterable[str]) -> list[Requirement]:
    from pip._vendor.packaging.requirements import Requirement

    return [Requirement(requirement) for requirement in requirements]


def wanted(requirement: Requirement, extras: Iterable[str], environment: Mapping[str, str]) -> bool:
    """Whether a package's requirement counts, given the package's own extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def reach(
    roots: Iterable[Requirement], resolved: Resolved, environment: Mapping[str, str], left_out: frozenset[str]
) -> dict[str, list[Requirement]]:
    """The packages that `roots` need in one environment, each with the requirements that name it."""
    found: dict[str, list[Requirement]] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    queue = [root for root in roots if wanted(root, (), environment)]
    while queue:
        requirement = queue.pop()
        name = canonical(requirement.name)
        if name in left_out:
            continue
        found.setdefault(name, []).append(requirement)
        step = (name, frozenset(requirement.extras))
        if step in visited or name not in resolved:
            continue
        visited.add(step)
        requires = parse(resolved[name].requires)
        queue += [each for each in requires if wanted(each, requirement.extras, environment)]
    return found


def pip_resolve(requirements: Iterable[str], constraints: Iterable[str], folder: Path) -> Resolved:
    """What pip would install here, from an empty environment."""
    asked, bounds, report = folder / "requirements.in", folder / "constraints.txt", folder / "report.json"
    asked.write_text("\n".join(requirements))
    bounds.write_text("\n".join(constraints))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--use-feature=fast-deps", "--report", str(report), "-r", str(asked), "-c", str(bounds)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if run.returncode:
        raise Unresolved(run.stdout + run.stderr)
    items: list[dict[str, Any]] = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {
        canonical(item["name"]): Package(item["version"], tuple(item.get("requires_dist", ())))
        for item in items
    }


class Unresolved(LockError):
    """pip found no solution."""

    def __init__(self, output: str) -> None:
        self.output = output
        errors = [
            line
            for line in output.splitlines()
            if line.startswith(("ERROR", "    ")) and "Downloading" not in line
        ]
        super().__init__("pip could not resolve the requirements:\n" + "\n".join(errors[-12:]))

    def blamed(self) -> set[str]:
        """The constraints that stand in the way."""
        return set(re.findall(r"The user requested \(constraint\) ([\w.-]+?)=", self.output))


def agree(requirements: list[str], constraints: dict[str, str], folder: Path) -> Resolved:
    """Resolve with as many of the constraints as possible; those that conflict are removed from the dict."""
    while True:
        try:
            return pip_resolve(requirements, constraints.values(), folder)
        except Unresolved as error:
            blamed = {name for name in constraints if name in map(canonical, error.blamed())}
            if not blamed:
                raise
            print(f"  not shared: {', '.join(sorted(blamed))}", flush=True)
            for name in blamed:
                del constraints[name]


def lock(
    engine: str, requirements: list[str], constraints: dict[str, str], left_out: frozenset[str], folder: Path
) -> dict[str, str]:
    """The lock file's lines by package name, complete for every environment."""
    asked = list(requirements)
    while True:
        resolved = agree(asked, constraints, folder)
        reached = [
            reach(parse(requirements), resolved, environment, left_out)
            for environment in environments(engine)
        ]
        # pip reads markers for this machine only. What others need too becomes a requirement of its own.
        absent = {
            f"{requirement.name}{requirement.specifier}"
            for packages in reached
            for name, needed_by in packages.items()
            if name not in resolved
            for requirement in needed_by
        }
        if not absent - set(asked):
            break
        print(f"  for other environments: {', '.join(sorted(absent))}", flush=True)
        asked += sorted(absent - set(asked))
    names = sorted(set().union(*reached))
    return {name: f"{name}=={resolved[name].version}{_marker(engine, name, reached)}" for name in names}


def _marker(engine: str, name: str, reached: list[dict[str, list[Requirement]]]) -> str:
    """Limit a package that only one kind of machine needs to that kind."""
    machines = {
        environment["platform_machine"]
        for environment, packages in zip(environments(engine), reached, strict=True)
        if name in packages
    }
    return f' ; platform_machine == "{machines.pop()}"' if len(machines) < len(MACHINES[engine]) else ""


def constraints_of(lines: Mapping[str, str]) -> dict[str, str]:
    """Lock file lines as constraints; `===` keeps a local version such as 2.0+cpu from matching 2.0."""
    return {
        name: re.sub(r"==([^+]+)\+.*", r"===\1", line.split(" ;")[0]) if "+" in line else line.split(" ;")[0]
        for name, line in lines.items()
    }


def write_locks(folder: Path) -> None:
    """Resolve all three sets and write them."""
    project = read_project()
    dependencies, extras = project["dependencies"], project["optional-dependencies"]
    print("Resolving cpu.txt", flush=True)
    cpu = lock("cpu", dependencies + extras["cpu"], {}, LEFT_OUT_OF_CPU, folder)
    print("Resolving cuda.txt", flush=True)
    cuda = lock("cuda", dependencies + extras["cuda"], constraints_of(cpu), frozenset(), folder)
    print("Resolving dev.txt", flush=True)
    dev = lock("cpu", extras["dev"], constraints_of(cpu), frozenset(), folder)
    write("cpu", cpu.values())
    write("cuda", cuda.values())
    write("dev", (line for name, line in dev.items() if name not in cpu or name not in cuda))


def write(name: str, lines: Iterable[str]) -> None:
    packages = list(lines)
    text = HEADER.format(what=WHAT[name]) + "".join(f"{line}\n" for line in packages)
    (LOCKS / f"{name}.txt").write_text(text)
    print(f"Wrote requirements/{name}.txt, {len(packages)} packages", flush=True)


def read_project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


# --- the engine's fields: run by the Python of .venv ----------------------------------------------

LIST_FIELDS = """
import dataclasses, json, re, sys, types, typing

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs


def text(kind):
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is None or kind is type(None):
        return "None"
    if kind is Ellipsis:
        return "..."
    if isinstance(kind, list):
        return "[" + ", ".join(map(text, kind)) + "]"
    if origin is typing.Literal:
        return "Literal[" + ", ".join(map(repr, arguments)) + "]"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(text, arguments))
    if origin is typing.Annotated:
        return text(arguments[0])
    if origin is not None and arguments:
        return text(origin) + "[" + ", ".join(map(text, arguments)) + "]"
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))
    return re.sub(r"\\b(?:\\w+\\.)+(?=\\w)", "", name)


fields = {field.name: text(field.type) for field in dataclasses.fields(AsyncEngineArgs)}
json.dump({"version": vllm.__version__, "fields": fields}, open(sys.argv[1], "w"))
"""

FIELDS_MODULE = '''\
{noqa}"""vLLM's engine arguments and their types. Made by `make lock`; do not edit."""

VLLM_VERSION = "{version}"

ENGINE_FIELDS: dict[str, str] = {{
{lines}
}}
'''


def write_engine_fields(folder: Path) -> None:
    """Write the names and types of vLLM's AsyncEngineArgs, as .venv's vLLM has them."""
    pinned = next(iter(re.findall(r"==(.*)", read_project()["optional-dependencies"]["cpu"][0])))
    python = ROOT / ".venv" / "bin" / "python"
    again = "Run `make setup`, then `make lock` again."
    if not python.exists():
        raise LockError(f"engine_fields.py was not written: there is no .venv with vLLM to ask. {again}")
    answer = folder / "fields.json"
    run = subprocess.run(
        [python, "-c", LIST_FIELDS, answer],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise LockError(f"engine_fields.py was not written: .venv cannot import vLLM ({reason}). {again}")
    found = json.loads(answer.read_text())
    if found["version"] != pinned:
        raise LockError(
            f"engine_fields.py was not written: .venv has vLLM {found['version']}, not {pinned}. {again}"
        )
    lines = [
        f"    {_quote(name)}: {_quote(kind)}," for name, kind in found["fields"].items() if name[0] != "_"
    ]
    noqa = "# ruff: noqa: E501\n" if max(map(len, lines)) > 110 else ""
    ENGINE_FIELDS.write_text(FIELDS_MODULE.format(noqa=noqa, version=pinned, lines="\n".join(lines)))
    print(f"Wrote gemma_serve/engine_fields.py, {len(lines)} fields of vLLM {pinned}", flush=True)


def _quote(text: str) -> str:
    """A string literal as the formatter writes it: double quotes, unless that needs escapes."""
    return repr(text) if '"' in text and "'" not in text else json.dumps(text)


# --- command line ---------------------------------------------------------------------------------


def resolver(folder: Path) -> Path:
    """A new virtual environment with a current pip; returns its Python."""
    print("Creating a temporary environment with a current pip", flush=True)
    python = folder / "venv" / "bin" / "python"
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-m", "venv", folder / "venv"],
        [python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
    )
    for command in commands:
        run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if run.returncode:
            raise LockError(f"the temporary environment could not be made:\n{run.stderr.strip()}")
    return python


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        if len(sys.argv) == 3 and sys.argv[1] == "--resolve":
            write_locks(Path(sys.argv[2]))
            return 0
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            code = subprocess.call([resolver(folder), __file__, "--resolve", folder])
            if code == 0:
                write_engine_fields(folder)
            return code
    except LockError as error:
        print(f"Lock failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
