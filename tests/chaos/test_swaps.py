"""Models change under load, again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..test_models_live import swap_under_load, two_models
from .conftest import FULL


@pytest.mark.skipif(not FULL, reason="`make chaos` runs it; CI swaps twice, in test_models_live.py")
async def test_ten_swaps_and_back(tmp_path: Path) -> None:
    async with two_models(tmp_path) as models:
        await swap_under_load(models, 10, lambda line: print(line, flush=True))
