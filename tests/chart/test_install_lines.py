"""The lines of the READMEs that install the chart, run by a shell as far as there is no cluster."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gemma_serve.api_keys import digest_of
from gemma_serve.key_file import read_keys

from ..conftest import ROOT
from .conftest import CHART, Manifest, Render, container, merged, of_kind, read, servers

RECORDER = """\
#!{python}
import json, pathlib, sys
files = [each.partition("=")[2] for each in sys.argv if each.startswith("--from-file=")]
call = {{"words": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]], "files": {{}}}}
call["files"] = {{name: pathlib.Path(name).read_text() for name in files}}
with open({calls!r}, "a") as calls:
    print(json.dumps(call), file=calls)
"""
"""Stands in for a command that talks to a cluster: writes down what it was told."""

Secrets = dict[str, dict[str, str]]


@dataclass
class Release:
    values: Manifest
    secrets: Secrets = field(default_factory=dict)
    """Those that were there when it was installed."""


def releases(text: str, folder: Path) -> Iterator[Release]:
    """What a shell installs when it runs the first block of code that installs something."""
    import helm_python as helm

    (block, *_) = [
        code for code in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "helm " in code
    ]
    for name in ("kubectl", "helm"):
        (folder / name).write_text(RECORDER.format(python=sys.executable, calls=str(folder / "calls")))
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = ["bash", "-euo", "pipefail", "-c", block]
    environ = {"PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(shell, cwd=folder, env=environ, check=True, timeout=120, capture_output=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs=2)
    parser.add_argument("-f", action="append", default=[], dest="files")
    parser.add_argument("--set", action="append", default=[])
    secrets: Secrets = {}
    for call in map(json.loads, (folder / "calls").read_text().splitlines()):
        match call["words"]:
            case ["kubectl", "create", "secret", "generic", name, *entries]:
                secrets[name] = dict(entry(each, call["files"]) for each in entries)
            case ["helm", "install" | "upgrade" | "template", *rest]:
                options = parser.parse_args(rest)
                assert options.names[1] == str(CHART.relative_to(ROOT))
                values = merged(*(read(ROOT / file) for file in options.files))
                yield Release(merged(values, *map(helm.parse_set_string, options.set)), dict(secrets))
            case ["helm", "test", _]:
                pass
            case words:
                raise AssertionError(f"what does {words} do?")


def entry(option: str, files: dict[str, str]) -> tuple[str, str]:
    kind, _, value = option.partition("=")
    if kind == "--from-file":
        return value, files[value]
    assert kind == "--from-literal"
    name, _, content = value.partition("=")
    return name, content


def asked_for(node: Any) -> Iterator[tuple[str, str]]:
    """(Secret, entry) of each reference in a manifest."""
    if isinstance(node, list):
        for each in node:
            yield from asked_for(each)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name in ("secretKeyRef", "credentials"):
                yield value["name"], value["key"]
            elif name == "secret":
                yield from ((value["secretName"], item["key"]) for item in value["items"])
            else:
                yield from asked_for(value)


@pytest.mark.parametrize(
    ("readme", "section"), [(ROOT / "README.md", "\n### In Kubernetes\n"), (CHART / "README.md", "")]
)
def test_the_lines_install_what_has_its_secrets(
    render: Render, tmp_path: Path, readme: Path, section: str
) -> None:
    text = readme.read_text(encoding="utf8")
    found = list(releases(text[text.index(section) :], tmp_path))
    assert found
    for release in found:
        manifests = render(release.values)
        assert container(servers(manifests)[0])["image"].startswith("REGISTRY/gemma-serve:")
        for name, key in asked_for(manifests):
            assert release.secrets[name][key]
        assert set(release.secrets) == {name for name, _ in asked_for(manifests)} or not release.secrets


def test_the_keys_are_for_who_gets_them(render: Render, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    (release,) = releases(text[text.index("\n### In Kubernetes\n") :], tmp_path)
    (monitor,) = of_kind(render(release.values), "ServiceMonitor")
    (given,) = [endpoint["authorization"]["credentials"] for endpoint in monitor["spec"]["endpoints"]]
    file = tmp_path / "of-the-secret.yaml"
    file.write_text(release.secrets[release.values["apiKeys"]["existingSecret"]]["keys.yaml"])
    scopes = {key.sha256: key.scopes for key in read_keys(file)}
    for secret, scope in ((given["name"], "metrics"), (release.values["test"]["keySecret"], "inference")):
        assert scopes[digest_of(release.secrets[secret]["key"]).hex()] == (scope,)
