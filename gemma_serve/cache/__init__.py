"""Answers that are kept for who asked: the same question costs nothing again, and runs once at a time."""

from .answer import Answer, AnswerStream
from .flight import Flight, Seat, SeatStream
from .key import SHARED, CacheKey
from .response_cache import OUTCOMES, Outcome, ResponseCache

__all__ = [
    "OUTCOMES",
    "SHARED",
    "Answer",
    "AnswerStream",
    "CacheKey",
    "Flight",
    "Outcome",
    "ResponseCache",
    "Seat",
    "SeatStream",
]
