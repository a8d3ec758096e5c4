"""Why a model cannot be loaded, in a sentence; `test_server.py` shows that the server ends with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_serve.engine.lifecycle import VLLMEngine
from gemma_serve.engine.load_errors import sentence
from gemma_serve.engine.vllm_engine import EngineBuilder
from gemma_serve.errors import StartupError
from gemma_serve.settings import Settings


async def test_no_such_folder() -> None:
    with pytest.raises(StartupError, match="found neither as a local folder nor on Hugging Face"):
        await VLLMEngine(Settings(model={"name": "/nowhere/gemma"})).check()


async def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json"):
        await VLLMEngine(Settings(model={"name": str(tmp_path)})).check()


def test_what_vllm_refuses() -> None:
    settings = Settings(model={"name": "gemma-demo"}, engine={"tensor_parallel_size": 7})
    with pytest.raises(ValueError) as refused:
        EngineBuilder(settings, print)
    assert "must be divisible by tensor parallel size (7)" in sentence(refused.value, "gemma-demo")
