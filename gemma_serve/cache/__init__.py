"""Answers that are kept for who asked: the same question costs nothing again, and runs once at a time."""

from .answer import Answer, AnswerHead, Run, put_pieces
from .flight import Flight, Seat, SeatHead
from .key import SHARED, CacheKey
from .repeats import Origin, Repeat, RepeatedHit
from .response_cache import ResponseCache

__all__ = [
    "SHARED",
    "Answer",
    "AnswerHead",
    "CacheKey",
    "Flight",
    "Origin",
    "Repeat",
    "RepeatedHit",
    "ResponseCache",
    "Run",
    "Seat",
    "SeatHead",
    "put_pieces",
]
