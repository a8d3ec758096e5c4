"""How much each client may take: requests per minute, tokens per minute and per day, requests in flight."""

from .limiter import (
    Lease,
    RateLimiter,
    RequestsExceeded,
    abandon,
    current_lease,
    keep_reserved,
    reserve_tokens,
)

__all__ = [
    "Lease",
    "RateLimiter",
    "RequestsExceeded",
    "abandon",
    "current_lease",
    "keep_reserved",
    "reserve_tokens",
]
