"""Every file of configs/ loads, and vLLM takes what it says for a model of that shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from vllm.engine.arg_utils import AsyncEngineArgs

from gemma_serve.engine.arguments import engine_arguments
from gemma_serve.engine.families import family_of
from gemma_serve.engine.published import published
from gemma_serve.settings import DEMO_MODEL, Settings

from .conftest import ROOT

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def shape_of(name: str) -> transformers.PretrainedConfig:
    """What decides about attention, context and sharding, as published, for `config.json`; no weights."""
    if (config := published(name)) is not None:
        return transformers.AutoConfig.for_model(**config)
    assert name == "google/gemma-4-26B-A4B-it"
    # Without its eyes: those want torchvision, which is not installed beside vLLM for the CPU.
    gemma_4 = transformers.Gemma4TextConfig(num_hidden_layers=30, max_position_embeddings=262144)
    gemma_4.architectures = ["Gemma4ForCausalLM"]
    return gemma_4


def load(path: Path, **environ: str) -> Settings:
    return Settings.load(config=path, environ=environ, env_file=None)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads(path: Path) -> None:
    assert load(path).model.name
    assert Settings.load(config=path.stem, environ={}, env_file=None) == load(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_vllm_takes_every_preset(path: Path, tmp_path: Path) -> None:
    settings = load(path, GEMMA_PERFORMANCE_DEVICE="auto")  # this machine may have no GPU
    name = settings.model.name
    if name != DEMO_MODEL:
        shape_of(name).save_pretrained(tmp_path)
        settings = load(path, GEMMA_PERFORMANCE_DEVICE="auto", GEMMA_MODEL_NAME=str(tmp_path))
    arguments = engine_arguments(settings)
    arguments.pop("reasoning_parser", None)  # would read the tokenizer
    config = AsyncEngineArgs(**arguments, skip_tokenizer_init=True).create_engine_config()
    assert family_of(config.model_config.hf_config.model_type).name != "not a Gemma"
    assert config.model_config.max_model_len == settings.model.max_length
    wanted = settings.performance.precision
    assert wanted == "auto" or str(config.model_config.dtype) == f"torch.{wanted}"
    size = settings.engine.get("tensor_parallel_size", 1)
    assert config.parallel_config.tensor_parallel_size == size
    assert config.model_config.get_num_kv_heads(config.parallel_config) >= 1
