"""LoRA adapters before vLLM sees them; `test_models_live.py` loads real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_serve.engine.adapters import _describe
from gemma_serve.errors import InvalidRequest


def test_a_path_that_no_folder_can_have_is_the_clients_fault(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="File name too long"):
        _describe("x" * 1000)
    with pytest.raises(InvalidRequest, match="holds no LoRA adapter"):
        _describe(str(tmp_path))
    assert _describe("org/adapter") == ["org/adapter"]
