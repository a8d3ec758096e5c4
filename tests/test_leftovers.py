"""A model that is gone leaves nothing in the server's memory."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from gemma_serve.engine.base import EngineState
from gemma_serve.engine.lifecycle import VLLMEngine
from gemma_serve.engine.switch import EngineSwitch
from gemma_serve.settings import Settings

from .conftest import ROOT, until
from .tiny_models import make_model


def tokenizers_of(model: str) -> int:
    return sum(
        issubclass(type(thing), PreTrainedTokenizerBase) and thing.name_or_path == model
        for thing in gc.get_objects()
    )


async def come_and_go(model: str) -> None:
    settings = Settings(
        model={"name": model, "max_length": 1024},
        engine={"enforce_eager": True, "kv_cache_memory_bytes": 100_000_000},
    )
    switch = EngineSwitch(settings, VLLMEngine)
    await switch.start()
    await until(lambda: switch.status.state is EngineState.READY or switch.status.failed, 240)
    assert switch.status.ready, switch.status.error
    gc.unfreeze()  # what serves was frozen, and is not listed
    assert tokenizers_of(model)
    await switch.end()
    gc.collect()  # as the next load does
    assert not tokenizers_of(model)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_tokenizer_outlives_its_model(tmp_path: Path) -> None:
    """In a process of its own: an engine that stops ends all of its process's children."""
    model = make_model("gemma3_text", tmp_path / "model")
    command = [sys.executable, "-m", "tests.test_leftovers", str(model)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert ended.returncode == 0, ended.stderr[-4000:]


if __name__ == "__main__":
    asyncio.run(come_and_go(sys.argv[1]))
