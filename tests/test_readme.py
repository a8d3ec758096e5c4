"""README and CHANGELOG say what is true: ratchets against a setting, a route or a file that they forget."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from gemma_serve import __version__
from gemma_serve.app import create_app
from gemma_serve.engine_fields import ENGINE_FIELDS
from gemma_serve.settings import Settings, fields, variable_name

from .conftest import ROOT, ServerProcess

README = (ROOT / "README.md").read_text(encoding="utf8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
"""The README without its blocks of code."""

SETTINGS = list(fields())


def row(section: str, field: str, info: Any) -> str:
    """A setting's line in README's table, as the settings class has it."""
    meaning = " ".join(info.description.split())
    if typing.get_origin(info.annotation) is typing.Literal:
        meaning += f" One of {', '.join(f'`{value}`' for value in typing.get_args(info.annotation))}."
    return f"| `{variable_name(section, field)}` | {shown_default(info.default)} | {meaning} |"


def shown_default(default: Any) -> str:
    if isinstance(default, tuple):
        default = ",".join(default) or None
    if default is None:
        return "not set"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def test_every_setting_stands_in_the_table() -> None:
    missing = [line for setting in SETTINGS if (line := row(*setting)) not in README.splitlines()]
    assert not missing, "README.md lacks these lines of its settings table:\n" + "\n".join(missing)


def test_the_table_has_no_setting_that_is_gone() -> None:
    known = {variable_name(section, field) for section, field, _ in SETTINGS}
    in_table = set(re.findall(r"^\| `(GEMMA_\w+)` \|", README, re.MULTILINE))
    assert in_table <= known, f"README.md's table has {in_table - known}, which are no settings"


def test_every_route_is_named() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    routes = [f"`{method.upper()} {path}`" for path, methods in paths.items() for method in methods]
    missing = [route for route in routes if route not in README]
    assert routes
    assert not missing, f"README.md's table of the API lacks {', '.join(missing)}"


def test_the_version_is_the_changelogs_newest() -> None:
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)\]? - \d{4}-\d{2}-\d{2}$", CHANGELOG, re.MULTILINE)
    assert newest, "CHANGELOG.md has no heading such as `## 1.2.3 - 2026-01-31`"
    assert newest[1] == __version__, f"CHANGELOG.md ends with {newest[1]}, gemma_serve is {__version__}"


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_every_file_named_exists(document: str) -> None:
    text = PROSE if document == "README.md" else CHANGELOG
    # In backticks, what ends like a file or a folder; in links, what is no URL.
    named = re.findall(r"`([\w][\w./-]*(?:\.(?:py|md|yaml|toml|txt|json|jinja)|/))`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [name for name in (*named, *linked) if not (ROOT / name).exists()]
    assert not missing, f"{document} names {', '.join(missing)}, which is not in the repository"


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # In code only: "make" is a word too.
    code = re.findall(r"^```.*?^```$|`[^`\n]+`", README, re.DOTALL | re.MULTILINE)
    named = {name for text in code for name in re.findall(r"\bmake ([a-z-]+)", text)}
    assert named and named <= targets, f"README.md names make {named - targets}, the Makefile has {targets}"


@pytest.mark.slow  # the first test that asks for `live` waits for the model
def test_the_python_snippet_works_as_pasted(live: ServerProcess, tmp_path: Path) -> None:
    snippet = re.search(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert snippet and "http://localhost:8000" in snippet[1]
    program = tmp_path / "snippet.py"
    program.write_text(snippet[1].replace("http://localhost:8000", live.url), encoding="utf8")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


MOVING = README.partition("## Moving from `vllm serve`")[2].partition("\n## ")[0]


def test_the_flags_of_vllm_serve_and_our_settings_exist() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
    ours = {f"{section}.{field}" for section, field, _ in SETTINGS} | {f"engine.{f}" for f in ENGINE_FIELDS}
    rows = re.findall(r"^\| (?!Flag)([^|]*--[^|]*) \| ([^|]*) \|$", MOVING, re.MULTILINE)
    assert len(rows) > 25
    for theirs, here in rows:
        named = set(re.findall(r"`(--[\w-]+)`", theirs))
        assert named and named <= flags, f"vllm serve has no {named - flags}"
        settings = set(re.findall(r"`([a-z]+\.[a-z_]+)`", here))
        assert settings <= ours, f"there is no setting {settings - ours}"


def test_the_routes_of_vllm_serve_are_answered_as_told() -> None:
    answered, _, rest = MOVING.partition("\nNot answered:")
    not_answered = rest.partition("\n\n")[0]
    paths = set(create_app(Settings()).openapi()["paths"])
    routes = set(re.findall(r"`(/[\w/{}.]+)`", answered.partition("that are answered here:")[2]))
    assert routes and routes <= paths, f"not answered: {routes - paths}"
    missing = set(re.findall(r"`(/[\w/{}.]+)`", not_answered))
    assert missing and not missing & paths, f"answered by now: {missing & paths}"


def test_every_preset_stands_in_its_table() -> None:
    listed = set(re.findall(r"^\| `([\w-]+)` \| [^|]* \| [^|]* \|$", README, re.MULTILINE))
    presets = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert presets <= listed, f"README.md's table of presets lacks {presets - listed}"
