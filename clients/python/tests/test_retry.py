"""Which answers are tried again, for how long, and under which id."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx
import numpy as np
import pytest

from lifl_client import Client, Rejected, Retry, RoundClosed, Unreachable, UpdateRejected
from lifl_client.retry import retry_after, retryable

TENSORS = {"w": np.arange(4, dtype=np.float32)}
ACCEPTED = httpx.Response(202, json={"round": 1, "digest": "crc32c:0", "duplicate": True})

Answer = httpx.Response | httpx.TransportError


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def retry(self, total: float = 120.0) -> Retry:
        return Retry(total=total, sleep=self.sleep, clock=lambda: self.now)


class Script:
    """Answers in turn, the last one for ever; keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def ids(self) -> list[str]:
        return [request.headers["ce-id"] for request in self.requests]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def client(script: Callable[[httpx.Request], httpx.Response], retry: Retry) -> Client:
    return Client("http://gw", "j", "c", retry=retry, transport=httpx.MockTransport(script))


@pytest.mark.parametrize(
    "first",
    [
        *[httpx.Response(status) for status in (404, 408, 409, 429, 500, 502, 503, 504)],
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.WriteError("broken pipe"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
    ],
    ids=str,
)
def test_submit_repeats_itself_exactly(first: Answer, clock: Clock) -> None:
    script = Script(first, first, ACCEPTED)
    receipt = client(script, clock.retry()).submit(TENSORS, round=1, samples=5)
    assert receipt.duplicate
    assert script.ids == ["j.1.c.0"] * 3
    one, two, three = script.requests
    assert one.headers == two.headers == three.headers
    assert one.content == two.content == three.content
    assert len(clock.pauses) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 413, 415, 422])
def test_hopeless_updates_are_not_repeated(status: int, clock: Clock) -> None:
    problem = {
        "type": "about:blank",
        "title": "Nope",
        "status": status,
        "code": "tensor-shape",
        "detail": "w is [4], not [4,3]",
    }
    script = Script(
        httpx.Response(status, json=problem, headers={"content-type": "application/problem+json"})
    )
    with pytest.raises(UpdateRejected) as caught:
        client(script, clock.retry()).submit(TENSORS, round=1, samples=5)
    error = caught.value
    assert (error.code, error.status) == ("tensor-shape", status)
    assert (error.title, error.detail) == ("Nope", "w is [4], not [4,3]")
    assert len(script.requests) == 1


def test_closed_round(clock: Clock) -> None:
    script = Script(httpx.Response(410, json={"code": "round-closed", "detail": "round 1"}))
    with pytest.raises(RoundClosed) as caught:
        client(script, clock.retry()).submit(TENSORS, round=1, samples=5)
    assert caught.value.code == "round-closed"
    assert not isinstance(caught.value, UpdateRejected)
    assert len(script.requests) == 1


def test_retry_after_is_obeyed(clock: Clock) -> None:
    wait = httpx.Response(429, headers={"retry-after": "17"})
    script = Script(wait, httpx.Response(503, headers={"retry-after": "30"}), ACCEPTED)
    client(script, clock.retry()).submit(TENSORS, round=1, samples=5)
    assert clock.pauses == [17.0, 30.0]


def test_budget_ends_it_with_the_last_answer(clock: Clock) -> None:
    script = Script(httpx.Response(503, json={"code": "draining"}, headers={"retry-after": "25"}))
    with pytest.raises(UpdateRejected, match="draining"):
        client(script, clock.retry(total=60)).submit(TENSORS, round=1, samples=5)
    assert clock.pauses == [25.0, 25.0]
    refused = Script(httpx.ConnectError("refused"))
    with pytest.raises(Unreachable, match="refused"):
        client(refused, clock.retry(total=60)).submit(TENSORS, round=1, samples=5)
    assert clock.now <= 50 + 60


def test_own_pauses_grow_to_a_limit(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda _, most: most)
    script = Script(*[httpx.Response(500)] * 9, ACCEPTED)
    client(script, clock.retry()).submit(TENSORS, round=1, samples=5)
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_unknown_outcome_keeps_the_id_and_an_answer_spends_it(clock: Clock) -> None:
    script = Script(httpx.ReadError("reset"))
    sender = client(script, clock.retry(total=0))
    with pytest.raises(Unreachable):
        sender.submit(TENSORS, round=1, samples=5)
    script.answers = [httpx.Response(503)]
    with pytest.raises(UpdateRejected):
        sender.submit(TENSORS, round=1, samples=5)
    script.answers = [httpx.Response(422)]
    with pytest.raises(UpdateRejected):
        sender.submit(TENSORS, round=1, samples=5)
    script.answers = [ACCEPTED]
    sender.submit(TENSORS, round=1, samples=5)
    sender.submit(TENSORS, round=2, samples=5)
    assert script.ids == ["j.1.c.0", "j.1.c.0", "j.1.c.0", "j.1.c.1", "j.2.c.0"]


def test_missing_model_is_an_answer_and_missing_job_is_not(clock: Clock) -> None:
    missing = Script(httpx.Response(404, json={"code": "no-model"}))
    with pytest.raises(Rejected, match="no-model"):
        client(missing, clock.retry()).model(round=9)
    assert len(missing.requests) == 1
    late = Script(httpx.Response(404), httpx.Response(200, json={"token": "t", "heartbeat": "20s"}))
    client(late, clock.retry()).join()
    assert len(late.requests) == 2
    assert late.requests[0].content == late.requests[1].content


def test_foreign_error_bodies_are_kept(clock: Clock) -> None:
    html = Script(httpx.Response(413, text="<h1>too large</h1>"))
    with pytest.raises(UpdateRejected, match="too large") as caught:
        client(html, clock.retry()).submit(TENSORS, round=1, samples=5)
    assert caught.value.title == "Request Entity Too Large"


def test_retry_after_forms() -> None:
    assert retry_after(None) is None
    assert retry_after("0") == 0.0
    assert retry_after("12") == 12.0
    assert retry_after("soon") is None
    past = datetime.now(timezone.utc) - timedelta(hours=1)
    assert retry_after(format_datetime(past, usegmt=True)) == 0.0
    later = datetime.now(timezone.utc) + timedelta(days=1)
    seconds = retry_after(format_datetime(later, usegmt=True))
    assert seconds is not None
    assert 0 < seconds <= 86400


def test_retryable_is_cloudevents_list() -> None:
    assert [s for s in range(400, 500) if retryable(s)] == [404, 408, 409, 429]
    assert all(retryable(s) for s in (500, 502, 503, 504))
