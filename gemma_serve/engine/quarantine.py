"""Finds the request that kills the engine, so that it is answered with an error and all others live on.

Every death blames the requests that the engine had just begun to work on, or, when there was no such, all
that it worked on. Who is blamed for a crash is tried alone on the next engine before the others follow; who
was alone to blame twice is refused, and so is its like for an hour. Being killed from outside proves little
(it may be the kernel's out-of-memory killer, or an operator), so it weighs less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from cachetools import TTLCache
from vllm.v1.engine import EngineCoreRequest

KILLED, CRASHED = 1, 2
"""What a death adds to the blame, by what ended the process: a signal to kill, or a failure of its own."""
_SUSPECT = CRASHED
_GUILTY = 2 * CRASHED
_REMEMBERED_SECONDS = 3600
_REMEMBERED = 1024


class Quarantine:
    """Blame by the id of the client's request, and the content hashes of requests that were found guilty."""

    def __init__(self) -> None:
        self._blame: dict[str, int] = {}
        self._guilty: TTLCache[bytes, int] = TTLCache(_REMEMBERED, _REMEMBERED_SECONDS)

    def blame(self, suspects: Mapping[str, EngineCoreRequest], weight: int) -> str | None:
        """Count a death against `suspects`; the id of the one to refuse from now on, when it is certain."""
        for name in suspects:
            self._blame[name] = self._blame.get(name, 0) + weight
        if len(suspects) != 1:
            return None
        ((name, request),) = suspects.items()
        if self._blame[name] < _GUILTY:
            return None
        self._guilty[_content(request)] = len(request.prompt_token_ids or ())
        return name

    def suspected(self, name: str) -> bool:
        """Should it be tried alone before others join it?"""
        return self._blame.get(name, 0) >= _SUSPECT

    def refuses(self, request: EngineCoreRequest) -> bool:
        """Is it the like of one that was found guilty?"""
        # Hashing a long prompt takes milliseconds: only where the length fits.
        fits = self._guilty and len(request.prompt_token_ids or ()) in self._guilty.values()
        return bool(fits) and _content(request) in self._guilty

    def forget_all_but(self, names: Collection[str]) -> None:
        self._blame = {name: blame for name, blame in self._blame.items() if name in names}


def _content(request: EngineCoreRequest) -> bytes:
    """A hash of what the engine is asked to do, without who asks and when."""
    params = request.params
    parts = (
        request.prompt_token_ids,
        [feature.identifier for feature in request.mm_features or ()],
        [(name, getattr(params, name)) for name in params.__struct_fields__ if name not in _OF_THE_CLIENT],
        getattr(params, "seed", None) is not None,
        request.lora_request and request.lora_request.lora_name,
    )
    return hashlib.sha256(repr(parts).encode()).digest()


# `n` answers have `n` seeds.
_OF_THE_CLIENT = {"output_kind", "skip_clone", "seed"}
