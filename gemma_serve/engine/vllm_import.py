"""Importing vLLM, which its processes do one after the other, is most of a start: what makes it shorter.

It makes a million objects that stay, among which a search for garbage finds none.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys

_LOWERINGS = "torch._inductor.lowering"
_USUAL, _SELDOM = gc.get_threshold(), (100_000, 50, 1000)


def begin() -> None:
    """Before anything of vLLM is imported, in each process; then call `end`."""
    gc.set_threshold(*_SELDOM)
    if os.environ.get("TORCHDYNAMO_DISABLE") != "1" or _LOWERINGS in sys.modules:
        return
    # vLLM imports a third of torch's compiler just to patch it; where there is none, it does without.
    sys.modules[_LOWERINGS] = None  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # of another version, which is to be imported as it is
            import vllm  # noqa: F401
    finally:
        del sys.modules[_LOWERINGS]


def end() -> None:
    gc.set_threshold(*_USUAL)
