"""Why a model could not be loaded, in one sentence: what failed, and what to do where we know it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pydantic

from ..errors import StartupError

# What huggingface_hub and transformers say; they raise a bare OSError or ValueError.
_GATED = ("gated repo", "401 client error", "access to model")
_NOT_FOUND = (
    "not a valid model identifier",
    "can't load the configuration",
    "couldn't connect",
    "is not a local folder",
    "cannot find an appropriate cached snapshot",
    "invalid repository id",
    "repo id must",
)
_TOO_LARGE = (
    "out of memory",
    "allocate memory",
    "is less than requested memory",
    "is less than desired",
)


def sentence(error: object, name: str) -> str:
    """About `error`, an exception or its text, met while the model `name` was loaded."""
    gated = any(type(one).__name__ == "GatedRepoError" for one in _behind(error))
    if isinstance(error, pydantic.ValidationError):  # vLLM checks its configuration with pydantic
        error = "; ".join(dict.fromkeys(str(fault["msg"]) for fault in error.errors()))
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^(Value error, |(Value|Runtime)Error: )", "", text)
    lowered = text.lower()
    if isinstance(error, StartupError):
        return text
    if gated or any(hint in lowered for hint in _GATED):
        return (
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name} and set HF_TOKEN "
            "to a token of that account"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return f"the folder {name!r} holds no model: there is no config.json in it"
    if any(hint in lowered for hint in _NOT_FOUND):
        return (
            f"the model {name!r} was found neither as a local folder nor on Hugging Face: "
            "check its name, the network, and HF_TOKEN for gated models"
        )
    if any(hint in lowered for hint in _TOO_LARGE):
        return (
            f"{name} does not fit into the device's memory: lower engine.gpu_memory_utilization, "
            f"engine.kv_cache_memory_bytes or model.max_length, or use a smaller model ({text:.300})"
        )
    return f"{text:.600}"


def _behind(error: object) -> Iterator[BaseException]:
    """The exception and those that led to it, which vLLM often replaces by one that says less."""
    while isinstance(error, BaseException):
        yield error
        error = error.__cause__ or error.__context__
