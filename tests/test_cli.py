from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT, clean_environ


def run(
    *arguments: str, environ: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gemma_serve", *arguments],
        cwd=ROOT,
        env=clean_environ() | (environ or {}),
        capture_output=True,
        text=True,
        timeout=60,
        input=stdin,
    )


def test_check_shows_each_value_and_its_source() -> None:
    result = run("check", "--config", "demo", "--port", "9", environ={"GEMMA_LOG_LEVEL": "error"})
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in result.stdout.splitlines()}
    assert rows["server.port"] == ["9", "command line"]
    assert rows["log.level"] == ["ERROR", "environment"]
    assert rows["model.name"][0] == "gemma-demo"
    assert rows["model.name"][1].endswith("configs/demo.yaml")
    assert rows["server.host"] == ["127.0.0.1", "default"]
    assert rows["engine.enforce_eager"][0] == "true"


def test_check_masks_secrets() -> None:
    loader = 'engine.model_loader_extra_config={"aws_secret": "hunter2", "a": 1}'
    result = run("check", "--set", "engine.hf_token=hf_hunter2", "--set", loader)
    assert result.returncode == 0, result.stderr
    assert "hunter2" not in result.stdout
    assert "max_num_batched_tokens" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["check", "--port", "x"], "server.port"),
        (["check", "--set", "nonsense"], "write it as section.field=value"),
        (["check", "--set", "engine.max_num_seq=3"], "did you mean max_num_seqs?"),
        (["check", "--set", "engine.speculative_config={bad"], "engine.speculative_config"),
        (["check", "--config", "nowhere"], "no such configuration file"),
        (["serve", "--set", "server.workers=2"], "must be 1"),
    ],
)
def test_a_mistake_ends_with_a_sentence(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_help_teaches() -> None:
    assert "examples:" in run("--help").stdout
    text = run("serve", "--help").stdout
    assert "GEMMA_SERVER_PORT" in text
    assert "default: 8000" in text
    assert run().returncode == 2


def test_version() -> None:
    import gemma_serve

    assert run("--version").stdout.strip() == f"gemma_serve {gemma_serve.__version__}"


def test_console_scripts_are_installed() -> None:
    for name in ("gemma-server", "gemma-serve"):
        script = Path(sys.executable).parent / name
        result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
        assert result.stdout.startswith("gemma_serve "), result.stderr


def test_the_app_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, gemma_serve.app, gemma_serve.server; "
        "sys.exit(' '.join({'vllm', 'torch', 'transformers'} & sys.modules.keys()) or 0)"
    )
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    print(f"import gemma_serve.app: {time.monotonic() - started:.2f} s")
