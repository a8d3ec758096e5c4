"""The wheel: what is in it, and that it serves without the repository around it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from .conftest import ROOT, start_server


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True, timeout=120)
    (path,) = folder.glob("gemma_serve-*.whl")
    return path


def test_the_wheel_holds_what_the_server_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "gemma_serve/configs/demo.yaml",
        "gemma_serve/demo_model/config.json",
        "gemma_serve/demo_model/model.safetensors",
        "gemma_serve/demo_model/tokenizer.json",
        "gemma_serve/demo_model/chat_template.jinja",
        "gemma_serve/engine/logging.json",
        "gemma_serve/web/chat/index.html",
        "gemma_serve/web/chat/vendor/purify.es.mjs",
        "gemma_serve/web/swagger/swagger-ui-bundle.js",
        "gemma_serve/py.typed",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "requirements")) or "__pycache__" in name]
    assert wheel.stat().st_size < 12_000_000


@pytest.mark.slow
def test_the_installed_wheel_serves_the_embedded_model(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
    subprocess.run([*install, site, wheel], check=True, timeout=120)
    server = start_server("--config", "demo", environ={"PYTHONPATH": str(site)}, folder=tmp_path)
    try:
        server.wait_ready()
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert httpx.get(f"{server.url}/docs/assets/swagger-ui.css", timeout=60).status_code == 200
    finally:
        assert server.end() == 0
    assert "Traceback" not in server.text
    assert " - ERROR - " not in server.text
    check = "import gemma_serve; print(gemma_serve.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", check],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(str(site))
