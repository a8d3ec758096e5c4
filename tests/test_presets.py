"""Every file of configs/ loads, and vLLM takes what it says for a model of that shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from vllm.engine.arg_utils import AsyncEngineArgs

from gemma_serve.engine.arguments import engine_arguments
from gemma_serve.engine.families import family_of
from gemma_serve.settings import DEMO_MODEL, Settings

from .conftest import ROOT

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def gemma(**shape: Any) -> transformers.PretrainedConfig:
    config = transformers.GemmaConfig(**shape)
    config.architectures = ["GemmaForCausalLM"]
    return config


def gemma_3_text(**shape: Any) -> transformers.PretrainedConfig:
    config = transformers.Gemma3TextConfig(**shape)
    config.architectures = ["Gemma3ForCausalLM"]
    return config


def gemma_3(**shape: Any) -> transformers.PretrainedConfig:
    text = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131072}
    config = transformers.Gemma3Config(text_config=shape | text)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    return config


def gemma_4_text(**shape: Any) -> transformers.PretrainedConfig:
    # Without its eyes: those want torchvision, which is not installed beside vLLM for the CPU.
    config = transformers.Gemma4TextConfig(**shape)
    config.architectures = ["Gemma4ForCausalLM"]
    return config


SHAPES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "google/gemma-2b-it": lambda: gemma(
        hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1
    ),
    "google/gemma-3-1b-it": lambda: gemma_3_text(
        num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=32768
    ),
    "google/gemma-3-4b-it": lambda: gemma_3(
        num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4
    ),
    "google/gemma-3-12b-it": lambda: gemma_3(
        num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8
    ),
    "google/gemma-3-27b-it": lambda: gemma_3(
        num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128
    ),
    "google/gemma-4-26B-A4B-it": lambda: gemma_4_text(num_hidden_layers=30, max_position_embeddings=262144),
    "google/functiongemma-270m-it": lambda: gemma_3_text(
        num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=32768
    ),
}
"""What decides about attention, context and sharding, as published, for `config.json`; no weights."""


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
        SHAPES[name]().save_pretrained(tmp_path)
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
