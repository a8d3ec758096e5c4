"""How far a load is, read from what vLLM's processes write while they do it: they do not tell otherwise."""

from __future__ import annotations

import re
from typing import NamedTuple


class Progress(NamedTuple):
    phase: str
    share: float | None
    """What is done of the phase, 0 to 1; None where nobody knows."""


_SHARE = r".*?:\s+(\d+)%"
_PHASES = {
    phase: re.compile(pattern)
    for phase, pattern in {
        "downloading the weights": rf"(?:\.safetensors\b|Fetching \d+ files){_SHARE}",
        "loading the weights": rf"[Ll]oading \w+ checkpoint shards{_SHARE}",
        "capturing CUDA graphs": rf"Capturing [\w ]*CUDA graphs{_SHARE}",
        "compiling": r"for vLLM's torch\.compile|Dynamo bytecode transform|Compiling a graph"
        r"|Warming up model for the compilation",
    }.items()
}


def progress_of(line: str) -> Progress | None:
    """What the line tells of the load; None where it tells nothing."""
    for phase, pattern in _PHASES.items():
        if (match := pattern.search(line)) is not None:
            return Progress(phase, int(match[1]) / 100 if match.groups() else None)
    return None
