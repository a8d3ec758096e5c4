"""Answers that are kept for who asked: the same question costs nothing again, and runs once at a time."""

from .answer import Answer, AnswerStream, Run
from .flight import Flight, Seat, SeatStream
from .key import SHARED, CacheKey
from .repeats import Origin, Repeat, RepeatedHit
from .response_cache import ResponseCache

__all__ = [
    "SHARED",
    "Answer",
    "AnswerStream",
    "CacheKey",
    "Flight",
    "Origin",
    "Repeat",
    "RepeatedHit",
    "ResponseCache",
    "Run",
    "Seat",
    "SeatStream",
]
