"""What a model's config.json says about its memory. Reads no weights; transformers builds it without any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import demo_model
from ..errors import StartupError
from ..settings import DEMO_MODEL
from .published import published


@dataclass(frozen=True, slots=True)
class Layer:
    """An attention layer that has a KV cache of its own; `window` in tokens, None where it sees all."""

    kv_heads: int
    head_size: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Of all parameters, `kv_parameters` make keys and values, `replicated_parameters` are on each GPU.

    `step_parameters` are read to make one token of one chat.
    """

    name: str
    parameters: int
    kv_parameters: int
    replicated_parameters: int
    step_parameters: int
    weight_bytes: float
    """Of one parameter; with quantized weights the mean."""
    activation_bytes: int
    layers: tuple[Layer, ...]
    heads: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    max_length: int

    @property
    def kv_heads(self) -> int:
        return max((layer.kv_heads for layer in self.layers), default=1)


def read_shape(model: str, precision: str = "auto") -> Shape:
    """`model` is a folder, a published Gemma's name, or any name that Hugging Face's hub or cache has.

    Raises `StartupError` where there is no such model, or one of another kind.
    """
    config = _config(model)
    try:
        return _shape(model, precision, config, _module(config))
    except AttributeError as error:
        raise StartupError(
            f"{model} has another shape than a Gemma: its config.json tells no {error.name}"
        ) from error


def _shape(model: str, precision: str, config: Any, module: Any) -> Shape:
    text = config.get_text_config()
    counts = {"all": 0, "kv": 0, "replicated": 0, "step": 0}
    experts = getattr(text, "num_experts", None)
    active = text.top_k_experts / experts if experts else 1.0
    for name, parameter in module.named_parameters():
        counts["all"] += parameter.numel()
        if not any(part in name for part in _NOT_IN_A_STEP):
            counts["step"] += int(parameter.numel() * (active if ".experts." in name else 1))
        if parameter.dim() < 2:
            counts["replicated"] += parameter.numel()
        elif "vision" not in name and any(part in name for part in (".k_proj.", ".v_proj.")):
            counts["kv"] += parameter.numel()
    dtype = text.dtype or config.dtype or torch.bfloat16
    if precision != "auto":
        dtype = getattr(torch, precision)
    size = int(dtype.itemsize)
    mlp = text.intermediate_size
    return Shape(
        name=model,
        parameters=counts["all"],
        kv_parameters=counts["kv"],
        replicated_parameters=counts["replicated"],
        step_parameters=counts["step"],
        weight_bytes=_quantized_bytes(model, config, counts["all"]) or size,
        activation_bytes=size,
        layers=tuple(_layers(text)),
        heads=text.num_attention_heads,
        hidden_size=text.hidden_size,
        intermediate_size=max(mlp) if isinstance(mlp, (list, tuple)) else mlp,
        vocabulary=text.vocab_size,
        max_length=text.max_position_embeddings,
    )


# Towers read prompts only; of the embeddings of each layer a token has one row.
_NOT_IN_A_STEP = ("vision", "audio", "multi_modal_projector", "embed_tokens_per_layer")


def _config(model: str) -> Any:
    folder = demo_model.PATH if model == DEMO_MODEL else Path(model)
    try:
        if not folder.is_dir() and (known := published(model)) is not None:
            return transformers.AutoConfig.for_model(**known)
        return transformers.AutoConfig.from_pretrained(str(folder) if folder.is_dir() else model)
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{model}: neither a folder with a config.json nor a model that can be had: {error}"
        ) from error


def _module(config: Any) -> Any:
    """The model without memory: every parameter has a shape and no content."""
    for architecture in config.architectures or ():
        if (kind := getattr(transformers, architecture, None)) is not None:
            try:
                with torch.device("meta"):
                    return kind(config)
            except ImportError as error:  # such as timm, of Gemma 3n's images
                reason = " ".join(str(error).split())
                raise StartupError(
                    f"{architecture} needs a package that is not installed: {reason}"
                ) from error
    raise StartupError(f"transformers knows none of the architectures {config.architectures}")


def _quantized_bytes(model: str, config: Any, parameters: int) -> float | None:
    """Mean bytes of a parameter where the checkpoint is quantized, from its files' sizes."""
    if getattr(config, "quantization_config", None) is None:
        return None
    files = list(Path(model).glob("*.safetensors"))
    if not files:
        raise StartupError(f"{model} is quantized: its weights must be in a local folder to know their size")
    return sum(file.stat().st_size for file in files) / parameters


def _layers(text: Any) -> list[Layer]:
    """vLLM gives a layer that shares an earlier one's keys and values no cache (Gemma 3n, 4)."""
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    # Without kinds, a window is one of all layers.
    kind = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    kinds = getattr(text, "layer_types", None) or [kind] * text.num_hidden_layers
    each = getattr(text, "per_layer_config", None)
    return [
        Layer(
            kv_heads=(each[index] if each else text).num_key_value_heads,
            head_size=(each[index] if each else text).head_dim,
            window=text.sliding_window if kind == "sliding_attention" else None,
        )
        for index, kind in enumerate(kinds[:own])
    ]
