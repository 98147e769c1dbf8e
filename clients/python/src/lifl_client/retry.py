"""When a request is sent again, and how long after.

Only what may succeed unchanged is repeated: the statuses CloudEvents senders retry, and broken
connections. Every request of this client is safe to repeat, because events keep their id.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import httpx

from lifl_client.errors import Rejected, Unreachable

# A malformed request or an unsupported URL is our own fault and stays one.
BROKEN = (
    httpx.TimeoutException,
    httpx.NetworkError,
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)


@dataclass(frozen=True)
class Retry:
    """Exponential backoff with full jitter, unless the server says `Retry-After`."""

    total: float = 120.0
    """Seconds after the first attempt past which none is begun."""
    first: float = 0.2
    """Upper end of the first pause, seconds; doubled each time."""
    longest: float = 10.0
    """Upper end of any pause of our own choosing; `Retry-After` may ask for more."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def run(
        self,
        attempt: Callable[[], httpx.Response],
        rejected: type[Rejected] = Rejected,
        *,
        await_404: bool = True,
    ) -> httpx.Response:
        """Repeat `attempt` until it answers 2xx; raise `rejected` or `Unreachable` otherwise.

        `await_404`: a job may be created after its clients start, so 404 is waited out.
        """
        begun = self.clock()
        ceiling = self.first
        while True:
            pause: float | None = None
            failure: Exception
            try:
                response = attempt()
                if response.is_success:
                    return response
                failure = rejected.of(response)
                if not retryable(response.status_code, await_404):
                    raise failure
                pause = retry_after(response.headers.get("retry-after"))
            except BROKEN as cause:
                failure = Unreachable(f"{type(cause).__name__}: {cause}")
                failure.__cause__ = cause
            if pause is None:
                pause = random.uniform(0, ceiling)
                ceiling = min(2 * ceiling, self.longest)
            if self.clock() - begun + pause > self.total:
                raise failure
            self.sleep(pause)


def retryable(status: int, await_404: bool = True) -> bool:
    """Whether the same request may yet succeed."""
    return status in (408, 409, 429) or status >= 500 or (status == 404 and await_404)


def retry_after(value: str | None) -> float | None:
    """Seconds asked for by a `Retry-After` header (a number or an HTTP date), if it can be read."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
