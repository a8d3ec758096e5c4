"""The embedded model: a tiny Gemma 3 that lets everything run, end to end, without a download."""

from pathlib import Path
from typing import Final

PATH: Final = Path(__file__).resolve().parent
