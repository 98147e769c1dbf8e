"""The client: the steps of a round, and the loop over them.

join -> task (long poll) -> model -> train_fn -> submit -> task -> ... -> done | failed
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Literal

import httpx
from cloudevents.core.v1.event import CloudEvent

from lifl_client import events
from lifl_client.errors import JobFailed, LiflError, ModelCorrupt, Rejected, UpdateRejected
from lifl_client.retry import BROKEN, Retry, retryable
from lifl_client.tensors import Array, Encoded, Model, decode

log = logging.getLogger("lifl_client")

# Names go into paths, headers and event ids unescaped.
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
# Longer than any pause of a live gateway; a long poll adds its own wait.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)

TrainFn = Callable[[Model, int], tuple[Mapping[str, Array], int, Mapping[str, float] | None]]
"""`train_fn(model, round) -> (tensors, samples, metrics)`; the metrics are those of `model`."""


@dataclass(frozen=True)
class Task:
    """What the gateway asks of this client now."""

    state: Literal["wait", "train", "done", "failed"]
    round: int
    """The round to train for, or the last committed one."""
    deadline: datetime | None = None
    model_url: str | None = None
    model_sha256: str | None = None
    model_round: int | None = None
    """The round that made the model; 0 is the initial model."""
    reason: str | None = None


@dataclass(frozen=True)
class Receipt:
    """An acknowledged update: it will be in its round's aggregate exactly once."""

    id: str
    round: int
    digest: str
    duplicate: bool
    """The gateway had this very update already, from an earlier attempt."""


class Client:
    """One client of one job. Use from one thread; close it, or use it as a context manager."""

    def __init__(
        self,
        url: str,
        job: str,
        client: str,
        namespace: str = "default",
        join_token: str | None = None,
        *,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """No request is made yet. `join_token` is the job's join secret, if it has one."""
        for what, name in (("job", job), ("client", client), ("namespace", namespace)):
            if not NAME.fullmatch(name):
                raise ValueError(f"{what} {name!r} has characters beyond letters, digits and ._-")
        self.job = job
        self.client = client
        self.namespace = namespace
        self.token: str | None = None
        """Bearer token of this client, kept from joining."""
        self.heartbeat: float | None = None
        """Seconds within which the gateway wants to hear of this client."""
        self._join_token = join_token
        self._retry = retry or Retry()
        self._speaker = events.Speaker(namespace, job, client)
        self._path = f"/v1/namespaces/{namespace}/jobs/{job}"
        self._sent: dict[int, int] = {}
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, transport=transport)

    def __enter__(self) -> Client:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connections. The gateway forgets this client when its heartbeat is overdue."""
        self._http.close()

    def join(self, role: Literal["trainer", "evaluator"] = "trainer") -> None:
        """Say that this client is here, and keep the token that only this answer carries.

        An evaluator is never asked to train; its metrics decide over the job's stop rule.
        """
        event = self._speaker.event(
            events.AVAILABLE,
            # A client that starts anew joins anew: its id must not look like a retransmission.
            f"{self.job}.{self.client}.available.{uuid.uuid4().hex}",
            round=0,
            data={"role": role},
        )
        answer = _document(self._send(event, self._join_token))
        try:
            token, heartbeat = str(answer["token"]), _seconds(str(answer["heartbeat"]))
        except (KeyError, ValueError) as cause:
            raise LiflError(f"answer to joining: missing or bad {cause}") from cause
        self.token, self.heartbeat = token, heartbeat

    def task(self, wait: int = 30) -> Task:
        """What to do now; the gateway holds the answer back for up to `wait` seconds."""
        return _task(self._retry.run(lambda: self._poll(wait)))

    def model(
        self,
        round: int | None = None,
        *,
        task: Task | None = None,
        sha256: str | None = None,
    ) -> Model:
        """The model of `round`, or the one `task` names, or the newest.

        A task's digest, or `sha256`, is verified. Tensors come in the model's order and share one
        buffer; bf16 is widened to float32.
        """
        url: str = f"{self._path}/model"
        if task is not None:
            if round is not None:
                raise ValueError("give a round or a task, not both")
            url = task.model_url or url
            sha256 = sha256 or task.model_sha256
        elif round is not None:
            url = f"{url}?round={round}"
        file = bytearray()

        def attempt() -> httpx.Response:
            nonlocal file
            with self._http.stream("GET", url, headers=self._headers(url)) as response:
                if response.is_success:
                    file = _body(response)
                else:
                    response.read()
                return response

        # The job is known to exist by now, so a missing model is an answer, not a wait.
        self._retry.run(attempt, await_404=False)
        if sha256 is not None and (had := hashlib.sha256(file).hexdigest()) != sha256.lower():
            raise ModelCorrupt(f"model at {url} has sha256 {had}, announced was {sha256}")
        return decode(file)

    def submit(
        self,
        tensors: Mapping[str, Array],
        round: int,
        samples: int,
        kind: Literal["full", "diff"] = "full",
        dtype: Literal["f32", "f16", "bf16", "mixed"] | None = None,
    ) -> Receipt:
        """Send an update for `round`, weighted by `samples`; return once it is safe.

        `dtype` converts the float tensors while they are sent (None or mixed: as they are). The
        arrays are sent from where they lie and must not change meanwhile. A call that ended
        without an answer may be repeated with the same tensors: it keeps its id, so the update
        counts once. Raises `RoundClosed` or `UpdateRejected` when the gateway refuses for good.
        """
        number = self._sent.get(round, 0)
        try:
            receipt = self._update(tensors, round, samples, kind, dtype, number)
        except Rejected as error:
            if not retryable(error.status):
                self._sent = {round: number + 1}
            raise
        self._sent = {round: number + 1}
        return receipt

    def metrics(self, round: int, samples: int, metrics: Mapping[str, float]) -> None:
        """Report what the model of `round` (0 is the initial one) scores on `samples` samples."""
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name!r} is {value}, which JSON does not hold")
        event = self._speaker.event(
            events.METRICS,
            f"{self.job}.{round}.{self.client}.metrics.{uuid.uuid4().hex}",
            round,
            data={"round": round, "samples": samples, "metrics": values},
        )
        self._send(event, self.token)

    def train(
        self,
        train_fn: TrainFn,
        *,
        kind: Literal["full", "diff"] = "full",
        dtype: Literal["f32", "f16", "bf16", "mixed"] | None = None,
        wait: int = 30,
    ) -> Task:
        """Take part until the job is done; return the last task. Raises `JobFailed`.

        Joins first when `join` was not called. Metrics that `train_fn` returns are reported for
        the model it was given; a refusal of those is logged and no more.
        """
        loop = _Loop(self, train_fn, kind, dtype)
        if self.token is None:
            self.join()
        rejoined = False
        while True:
            try:
                task = self.task(wait)
                if task.state == "train":
                    loop.turn(task)
            except Rejected as error:
                # A gateway that lost its tokens asks everyone to come again, once.
                if error.status != 401 or rejoined:
                    raise
                rejoined = True
                self.join()
                continue
            rejoined = False
            if task.state == "done":
                return task
            if task.state == "failed":
                raise JobFailed(task.reason or "no reason given")

    def _update(
        self,
        tensors: Mapping[str, Array],
        round: int,
        samples: int,
        kind: str,
        dtype: str | None,
        number: int,
    ) -> Receipt:
        if kind not in ("full", "diff"):
            raise ValueError(f"kind is full or diff, not {kind!r}")
        if not 0 < samples < 1 << 64:
            raise ValueError(f"samples is the update's weight and cannot be {samples}")
        content = Encoded(tensors, dtype)
        event = self._speaker.event(
            events.UPDATE,
            f"{self.job}.{round}.{self.client}.{number}",
            round,
            {"flsamples": str(samples), "flkind": kind, "fldtype": content.dtype},
            content_type=events.SAFETENSORS,
        )
        headers = events.binary_headers(event)
        # Announced, so that the gateway can refuse or reserve before the first byte.
        headers["content-length"] = str(content.length)
        url = f"{self._path}/events"
        headers |= self._headers(url)
        answer = self._retry.run(
            lambda: self._http.post(url, headers=headers, content=iter(content)), UpdateRejected
        )
        receipt = _document(answer)
        return Receipt(
            id=str(receipt.get("id", event.get_id())),
            round=int(receipt.get("round", round)),
            digest=str(receipt.get("digest", "")),
            duplicate=receipt.get("duplicate") is True,
        )

    def _send(self, event: CloudEvent, bearer: str | None) -> httpx.Response:
        headers, body = events.structured(event)
        if bearer is not None:
            headers["authorization"] = f"Bearer {bearer}"
        url = f"{self._path}/events"
        return self._retry.run(lambda: self._http.post(url, headers=headers, content=body))

    def _poll(self, wait: int, patience: float = 60.0) -> httpx.Response:
        url = f"{self._path}/task"
        return self._http.get(
            url,
            params={"client": self.client, "wait": f"{wait}s"},
            headers=self._headers(url),
            timeout=httpx.Timeout(patience + wait, connect=10.0),
        )

    def _headers(self, url: str) -> dict[str, str]:
        """The token, but for our own gateway alone: a model may be said to lie elsewhere."""
        headers = {"accept-encoding": "identity"}
        base, target = self._http.base_url, self._http.base_url.join(url)
        ours = (base.scheme, base.host, base.port) == (target.scheme, target.host, target.port)
        if self.token is not None and ours:
            headers["authorization"] = f"Bearer {self.token}"
        return headers

    @contextmanager
    def _heard_of(self) -> Iterator[None]:
        """Polls beside long training, that the gateway does not think this client gone."""
        if not self.heartbeat:
            yield
            return
        done = threading.Event()
        # Two chances within each heartbeat.
        interval = self.heartbeat / 2

        def beat() -> None:
            while not done.wait(interval):
                try:
                    # Short, because the update must not wait for a beat that hangs.
                    self._poll(0, patience=5.0)
                except BROKEN as error:
                    log.info("%s: heartbeat not heard: %s", self.client, error)

        thread = threading.Thread(target=beat, name=f"lifl-{self.client}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Loop:
    """`train`'s memory of the last update, for a gateway that asks again.

    The gateway asks again for a round it has an update of when it lost that update, or has not
    noted it yet. The same id with the same content is right in both cases; training anew would
    bring other content under the old id (409), or count twice under a new one.
    """

    def __init__(
        self,
        client: Client,
        train_fn: TrainFn,
        kind: Literal["full", "diff"],
        dtype: Literal["f32", "f16", "bf16", "mixed"] | None,
    ) -> None:
        self.client = client
        self.train_fn = train_fn
        self.kind: Literal["full", "diff"] = kind
        self.dtype: Literal["f32", "f16", "bf16", "mixed"] | None = dtype
        self.last: tuple[tuple[int, str | None], Mapping[str, Array], int] | None = None

    def turn(self, task: Task) -> None:
        """Carry out one `train` task."""
        client = self.client
        asked = (task.round, task.model_sha256)
        if self.last is not None and self.last[0] == asked:
            _, tensors, samples = self.last
            self.again(task.round, tensors, samples)
            return
        self.last = None
        model = client.model(task=task)
        with client._heard_of():
            tensors, samples, metrics = self.train_fn(model, task.round)
        del model
        self.last = (asked, tensors, samples)
        if metrics is not None:
            self.report(task, samples, metrics)
        try:
            receipt = client.submit(tensors, task.round, samples, self.kind, self.dtype)
        except Rejected as error:
            if error.status != 410:
                raise
            log.info("%s: round %d closed: %s", client.client, task.round, error.detail)
        else:
            log.info("%s: round %d sent as %s", client.client, task.round, receipt.id)

    def again(self, round: int, tensors: Mapping[str, Array], samples: int) -> None:
        """Send the last update once more under its own id, then give the gateway a moment."""
        client = self.client
        number = max(client._sent.get(round, 0) - 1, 0)
        try:
            client._update(tensors, round, samples, self.kind, self.dtype, number)
        except Rejected as error:
            if error.status != 410:
                raise
        client._retry.sleep(1.0)

    def report(self, task: Task, samples: int, metrics: Mapping[str, float]) -> None:
        """Metrics go first: they are small, and this round must not close before they count."""
        round = task.round - 1 if task.model_round is None else task.model_round
        try:
            self.client.metrics(round, samples, metrics)
        except Rejected as error:
            if error.status == 401:
                raise
            log.warning("%s: metrics of round %d refused: %s", self.client.client, round, error)


def _document(response: httpx.Response) -> dict[str, Any]:
    try:
        document = json.loads(response.content)
    except ValueError as cause:
        raise LiflError(f"{response.request.url} did not answer with JSON") from cause
    if not isinstance(document, dict):
        raise LiflError(f"{response.request.url} answered JSON that is no object")
    return document


def _task(response: httpx.Response) -> Task:
    document = _document(response)
    model = document.get("model") or {}
    state = document.get("state")
    deadline = document.get("deadline")
    if state not in ("wait", "train", "done", "failed"):
        raise LiflError(f"task state {state!r} is unknown; is the gateway newer than this client?")
    return Task(
        state=state,
        round=int(document.get("round", 0)),
        deadline=None if deadline is None else _time(str(deadline)),
        model_url=model.get("url"),
        model_sha256=model.get("sha256"),
        model_round=model.get("round"),
        reason=document.get("reason"),
    )


def _body(response: httpx.Response) -> bytearray:
    """The whole body in one buffer, written once when its length is announced."""
    length = response.headers.get("content-length")
    if length is None or "content-encoding" in response.headers:
        grown = bytearray()
        for chunk in response.iter_bytes():
            grown += chunk
        return grown
    file = bytearray(int(length))
    view, at = memoryview(file), 0
    for chunk in response.iter_bytes():
        view[at : at + len(chunk)] = chunk
        at += len(chunk)
    if at != len(file):
        raise httpx.RemoteProtocolError(f"{at} bytes of {len(file)} came")
    return file


def _time(text: str) -> datetime:
    """RFC 3339. Python 3.10 reads neither `Z` nor other than six digits of a second's fraction."""
    text = re.sub(r"[zZ]$", "+00:00", text)
    return datetime.fromisoformat(re.sub(r"\.(\d+)", lambda m: f".{m[1]:0<6.6}", text))


def _seconds(duration: str) -> float:
    """`20s`, `500ms`, `1m30s` in seconds."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h))+", duration):
        raise ValueError(f"duration {duration!r}")
    return sum(float(n) * units[u] for n, _, u in re.findall(r"(\d+(\.\d+)?)(ms|s|m|h)", duration))
