"""When Python searches this process for garbage, which stops every stream: seldom.

What a request leaves is freed without a search, unless it is in reference cycles, which only few make.
Measured on an engine without a model: searching after every 700 new objects, as Python does, took 6.5% of
the CPU with 64 streams and 11.7% with 256, and up to 85 ms at once; after 20,000, 0.4 and 2%.
"""

from __future__ import annotations

import gc
from typing import Final

_SELDOM: Final = (20_000, 10, 5)
"""New objects before a search; and searches before one of what has survived some."""
_MOST_BYTES: Final = 64_000_000


def search_seldom() -> None:
    """From now on, and never in what is there; for when all that stays is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_SELDOM)


def search_everywhere() -> None:
    """Once, also in what was to stay."""
    gc.unfreeze()
    gc.collect()


class Bodies:
    """Searches after 64 MB of requests: a reference cycle of few objects may hold a large one.

    So it is with each image that pydantic looks at: what it builds knows an iterator, which knows it.
    """

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, size: int) -> None:
        self._bytes += size
        if self._bytes > _MOST_BYTES:
            self._bytes = 0
            gc.collect()
