"""Tokens, requests in flight and usage by day, counted in this process.

Tokens per minute are a bucket: it fills evenly, a reservation takes from it, a settlement puts back what was
not used, or takes what was used beyond. `limits` cannot give back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Protocol

from ..clients import Client

DAY = 86_400
USAGE_DAYS = 31
"""For how long usage is kept."""
_FEWEST_ACCOUNTS = 1024


class Entry(NamedTuple):
    """What comes of asking for a slot."""

    admitted: bool
    tokens_left: float
    """In the bucket of tokens per minute."""


class Reservation(NamedTuple):
    short_of: Literal["minute", "day"] | None
    wait: float
    """Seconds until asking again makes sense, where tokens are short."""
    tokens_left: float


class DayUsage(NamedTuple):
    date: str
    key: str | None
    """A key's name; None for all clients without one."""
    requests: int
    prompt_tokens: int
    completion_tokens: int


class Quotas(Protocol):
    """Either store. Those in Redis raise `StorageAway`."""

    async def enter(self, client: Client, slot: str) -> Entry:
        """Take a slot of those in flight, if one is free."""
        ...

    async def reserve(self, client: Client, day: int, tokens: int, name: str) -> Reservation:
        """Take tokens of the minute's and that day's, if there are enough of both.

        `name` is of this reservation alone.
        """
        ...

    async def settle(
        self,
        client: Client,
        slot: str | None,
        day: int,
        reserved: Mapping[str, int],
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        """A request of that day has ended: free its slot, put its tokens right, note its usage.

        `reserved` are the tokens of its reservations, by their names.
        """
        ...

    async def renew(self, client: Client, slot: str | None, day: int, reserved: Mapping[str, int]) -> None:
        """These are still in use."""
        ...

    async def usage(self, days: int) -> list[DayUsage]: ...


@dataclass(slots=True)
class _Account:
    capacity: int
    level: float
    at: float
    in_flight: int = 0
    day: int = 0
    day_tokens: int = 0


class MemoryQuotas:
    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = _FEWEST_ACCOUNTS
        self._usage: dict[int, dict[str | None, list[int]]] = {}

    async def enter(self, client: Client, slot: str) -> Entry:
        account, most = self._account(client), client.quotas.in_flight
        if most and account.in_flight >= most:
            return Entry(False, account.level)
        account.in_flight += 1
        return Entry(True, account.level)

    async def reserve(self, client: Client, day: int, tokens: int, name: str) -> Reservation:
        account, quotas = self._account(client), client.quotas
        today_too = account.day == day  # or the day it was admitted on is over, whose count it is
        if quotas.tokens_per_minute and account.level < tokens:
            wait = (tokens - account.level) * 60 / quotas.tokens_per_minute
            return Reservation("minute", wait, account.level)
        if today_too and quotas.tokens_per_day and account.day_tokens + tokens > quotas.tokens_per_day:
            return Reservation("day", until_tomorrow(), account.level)
        account.level -= tokens if quotas.tokens_per_minute else 0
        account.day_tokens += tokens if today_too else 0
        return Reservation(None, 0.0, account.level)

    async def settle(
        self,
        client: Client,
        slot: str | None,
        day: int,
        reserved: Mapping[str, int],
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        # Not by `_account`: what it is limited to may have changed since this request began.
        account = self._accounts.get(client.id) or self._account(client)
        unused = sum(reserved.values()) - prompt_tokens - completion_tokens
        account.in_flight -= slot is not None
        if account.capacity:
            account.level = min(account.capacity, account.level + unused)
        if account.day == day:
            account.day_tokens -= unused
        counts = self._of_day(day).setdefault(client.key, [0, 0, 0])
        counts[0] += 1
        counts[1] += prompt_tokens
        counts[2] += completion_tokens

    async def renew(self, client: Client, slot: str | None, day: int, reserved: Mapping[str, int]) -> None:
        pass  # they end with this process

    async def usage(self, days: int) -> list[DayUsage]:
        first = today() - days + 1
        return [
            DayUsage(date_of(day), key, *counts)
            for day, clients in self._usage.items()
            if day >= first
            for key, counts in clients.items()
        ]

    def _of_day(self, day: int) -> dict[str | None, list[int]]:
        if day not in self._usage:
            self._usage = {old: counts for old, counts in self._usage.items() if old > day - USAGE_DAYS}
            self._usage[day] = {}
        return self._usage[day]

    def _account(self, client: Client) -> _Account:
        """As it stands now."""
        now, capacity = time.monotonic(), client.quotas.tokens_per_minute
        account = self._accounts.get(client.id)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep(now)
            account = self._accounts[client.id] = _Account(capacity, capacity, now)
        if not account.capacity:  # it had no limit
            account.level = capacity
        account.level = min(capacity, account.level + (now - account.at) * capacity / 60)
        account.at, account.capacity = now, capacity
        if account.day != (day := today()):
            account.day, account.day_tokens = day, 0
        return account

    def _sweep(self, now: float) -> None:
        """Forget who would be the same if new, or an attacker's many addresses would fill the memory."""
        day = today()
        self._accounts = {
            id: account
            for id, account in self._accounts.items()
            if account.in_flight
            or (account.day == day and account.day_tokens)
            or account.level + (now - account.at) * account.capacity / 60 < account.capacity
        }
        self._sweep_at = max(_FEWEST_ACCOUNTS, 2 * len(self._accounts))


def today() -> int:
    """Days since 1970, in UTC."""
    return int(time.time() // DAY)


def until_tomorrow() -> float:
    return DAY - time.time() % DAY


def date_of(day: int) -> str:
    return f"{datetime.fromtimestamp(day * DAY, UTC):%Y-%m-%d}"
