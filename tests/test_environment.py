"""What vLLM is told through the environment."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from pathlib import Path

import pytest
from vllm import envs
from vllm.utils.system_utils import get_mp_context

from gemma_serve.engine import environment
from gemma_serve.settings import Settings

SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


@pytest.mark.parametrize("toolkit", [False, True])
def test_without_a_cuda_toolkit_nothing_is_compiled_with_it(
    toolkit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ["CUDA_HOME"] = str(tmp_path)
    os.environ.pop(SAMPLER, None)
    if toolkit:
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir()
        compiler.touch(0o755)
    environment.prepare(Settings(model={"name": "gemma-demo"}))
    assert os.environ.get(SAMPLER) == (None if toolkit else "0")
    os.environ[SAMPLER] = "1"
    environment.prepare(Settings(model={"name": "gemma-demo"}))
    assert os.environ[SAMPLER] == "1"  # the operator's own word


def test_the_engine_is_not_forked_out_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM sees to it by itself: what a GPU gets is asked of vLLM's own function."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(envs, "__getattr__", inspect.unwrap(envs.__getattr__))  # an engine caches them
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    assert envs.VLLM_WORKER_MULTIPROC_METHOD == "fork"
    environment.prepare(Settings(model={"name": "gemma-demo"}))
    assert get_mp_context().get_start_method() == "spawn"


def test_programs_beside_this_python_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer starts `ninja`, and `.venv/bin/gemma-server` is called by its path."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("python", "ninja-of-the-test"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for _ in range(2):
        environment.prepare(Settings(model={"name": "gemma-demo"}))
    assert shutil.which("ninja-of-the-test", path=os.environ["PATH"])
    assert os.environ["PATH"].count(str(tmp_path)) == 1
