"""The application does what its OpenAPI document says: schemathesis makes up the requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import start_fake

CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"
CHANGES = "^/v1/models/.+/"  # without a model all else is 503


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--checks", f"not_a_server_error,{CHECKS}", "--exclude-path-regex", CHANGES),
        ("--checks", CHECKS, "--include-path-regex", CHANGES),
    ],
    ids=["use", "changes of models"],
)
def test_no_undocumented_answer(tmp_path: Path, options: tuple[str, ...]) -> None:
    server = start_fake()
    try:
        document = f"{server.url}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "run", document, *options]
        more = ["--max-examples", "15", "--seed", "5", "--generation-database", "none", "--no-color"]
        result = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    finally:
        server.end()
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "Traceback" not in server.text
