"""A tiny random model of each Gemma family, as its published folder looks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_serve import demo_model

SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "sliding_window": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
PER_LAYER = {"vocab_size_per_layer_input": 4096, "hidden_size_per_layer_input": 32}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VOCABULARY = 4096  # more than the embedded model's tokenizer and the tokens below

IMAGE_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
GEMMA_4_TOKENS = (
    *("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
# What Gemma 4's own template does, as far as the tests look.
GEMMA_4_TEMPLATE = """{{ bos_token }}
{%- if enable_thinking %}{{ '<|turn>system\\n<|think|>\\n<turn|>\\n' }}{% endif -%}
{%- for message in messages -%}
    {{ '<|turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\\n' }}
    {%- if message.content is string -%}{{ message.content | trim }}
    {%- else -%}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif -%}
    {{ '<turn|>\\n' }}
{%- endfor -%}
{{ '<|turn>model\\n' }}"""


def make_model(model_type: str, folder: Path) -> Path:
    """A folder that `gemma-server serve --model` takes; random weights, the same each time."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    _MAKERS[model_type](folder)
    return folder


def _gemma(folder: Path) -> None:
    _save(transformers.GemmaForCausalLM, transformers.GemmaConfig(**_text()), folder)


def _gemma2(folder: Path) -> None:
    config = transformers.Gemma2Config(**_text(), query_pre_attn_scalar=64)
    _save(transformers.Gemma2ForCausalLM, config, folder)


def _gemma3_text(folder: Path) -> None:
    config = transformers.Gemma3TextConfig(**_text(), query_pre_attn_scalar=64)
    _save(transformers.Gemma3ForCausalLM, config, folder)


def _gemma3(folder: Path) -> None:
    newlines = ["\n" * count for count in range(1, 5)]  # Gemma's tokenizer has them as tokens
    vocabulary = _save_tokenizer(folder, [*IMAGE_TOKENS.values()], newlines, IMAGE_TOKENS)
    ids = [vocabulary[token] for token in IMAGE_TOKENS.values()]
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**_text(), query_pre_attn_scalar=64),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
        eos_token_id=[1],
        **dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), ids, strict=True)),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(weight)  # zeros otherwise: the model would not see its images
    model.to(torch.bfloat16).save_pretrained(folder)
    # As Google's files name them, and as vLLM reads them.
    weights = load_file(folder / "model.safetensors")
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights
    }
    save_file(published, folder / "model.safetensors", {"format": "pt"})
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    image_processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "rescale_factor": 1 / 255,
        **dict.fromkeys(("do_normalize", "do_rescale", "do_resize"), True),
    }
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "preprocessor_config.json", processor | image_processor)


def _gemma3n_text(folder: Path) -> None:
    config = transformers.Gemma3nTextConfig(
        **_text(), **PER_LAYER, **LAYERS, num_kv_shared_layers=0, laurel_rank=8
    )
    _save(transformers.Gemma3nForCausalLM, config, folder)


def _gemma4_text(folder: Path) -> None:
    config = transformers.Gemma4TextConfig(**_text(), **PER_LAYER, **LAYERS, global_head_dim=64)
    _save(transformers.Gemma4ForCausalLM, config, folder)
    _save_tokenizer(folder, GEMMA_4_TOKENS)
    (folder / "chat_template.jinja").write_text(GEMMA_4_TEMPLATE)


def _embedding(folder: Path) -> None:
    """EmbeddingGemma: Gemma 3 that looks both ways, its mean, a projection, and the length made 1."""
    config = transformers.Gemma3TextConfig(
        **_text(), query_pre_attn_scalar=64, use_bidirectional_attention=True
    )
    _save(transformers.Gemma3TextModel, config, folder)
    dense = torch.nn.Linear(64, 32, bias=False)
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": dense.weight.data}, folder / "2_Dense" / "model.safetensors")
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    _write_json(
        folder / "2_Dense" / "config.json",
        {"in_features": 64, "out_features": 32, "bias": False} | activation,
    )
    (folder / "1_Pooling").mkdir()
    _write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True},
    )
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", modules)


_MAKERS = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "gemma3n_text": _gemma3n_text,
    "gemma4_text": _gemma4_text,
    "embedding": _embedding,
}


def _text() -> dict[str, Any]:
    return SIZE | {"vocab_size": VOCABULARY}


def _save(architecture: Any, config: Any, folder: Path) -> None:
    architecture(config).to(torch.bfloat16).save_pretrained(folder)
    _save_tokenizer(folder)


def _save_tokenizer(
    folder: Path,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """The embedded model's, without its chat template, and with more tokens; returns their ids."""
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in plain])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((demo_model.PATH / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if named:
        config |= {**named, "extra_special_tokens": dict(named)}
    _write_json(folder / "tokenizer_config.json", config)
    assert tokenizer.get_vocab_size() <= VOCABULARY
    return dict(tokenizer.get_vocab())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def without_torchvision(folder: Path) -> dict[str, str]:
    """Environment in which vLLM reads images with Pillow, where torchvision is not installed.

    PyPI has no torchvision for CPU builds of torch, and vLLM's Gemma 3 imports transformers' image processor
    that needs it, though transformers has one that does not. All of vLLM's processes load its plugins.
    """
    (folder / "pillow_images.py").write_text(_PLUGIN)
    metadata = folder / "pillow_images-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow-images\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\npillow_images = pillow_images:register\n"
    )
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


_PLUGIN = """\
import importlib.util
import sys


def register():
    if importlib.util.find_spec("torchvision") is None:
        from transformers.models.gemma3 import image_processing_pil_gemma3 as pillow

        pillow.Gemma3ImageProcessor = pillow.Gemma3ImageProcessorPil
        sys.modules["transformers.models.gemma3.image_processing_gemma3"] = pillow
"""
