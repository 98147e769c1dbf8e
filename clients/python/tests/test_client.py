"""What the client says on the wire, and the training loop, against a gateway of a few lines."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import httpx
import numpy as np
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event

from lifl_client import Client, JobFailed, LiflError, ModelCorrupt, Rejected, Retry
from lifl_client.tensors import Encoded, Model, decode

BASE = "/v1/namespaces/ns/jobs/digits"
SOURCE = "/namespaces/ns/jobs/digits/clients/alice"


class Gateway:
    """Tokens, tasks in a given order, a model, and a list of what came."""

    def __init__(self, *tasks: dict[str, Any]) -> None:
        self.tasks = list(tasks)
        self.token = "secret-of-alice"
        self.heartbeat = "20s"
        self.model = b"".join(Encoded({"w": np.zeros(3, np.float32), "n": np.array(4)}))
        self.update_status = 202
        self.requests: list[httpx.Request] = []
        self.polled = threading.Event()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        path = request.url.path
        structured = request.headers.get("content-type") == "application/cloudevents+json"
        event = json.loads(request.content) if structured else {}
        if event.get("type") == "dev.lifl.fl.client.available.v1":
            return httpx.Response(
                200,
                json={
                    "schema": "lifl.dev/joined/v1",
                    "token": self.token,
                    "heartbeat": self.heartbeat,
                },
            )
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return httpx.Response(401, json={"code": "no-token"})
        if path == f"{BASE}/task":
            if request.url.params["wait"] == "0s":
                self.polled.set()
                return httpx.Response(200, json={"state": "wait", "round": 0})
            return httpx.Response(200, json=self.tasks.pop(0))
        if path == f"{BASE}/model":
            return httpx.Response(200, content=self.model)
        if event:
            return httpx.Response(202)
        answer = {"round": 1, "id": request.headers["ce-id"], "digest": "crc32c:00000000"}
        return httpx.Response(self.update_status, json=answer)

    def client(self, join_token: str | None = None) -> Client:
        return Client(
            "http://gw:8080",
            job="digits",
            client="alice",
            namespace="ns",
            join_token=join_token,
            retry=Retry(sleep=lambda _: None),
            transport=httpx.MockTransport(self),
        )

    def train(self, round: int) -> dict[str, Any]:
        digest = hashlib.sha256(self.model).hexdigest()
        link = {"round": round - 1, "url": f"{BASE}/model?round={round - 1}", "sha256": digest}
        return {
            "schema": "lifl.dev/task/v1",
            "state": "train",
            "round": round,
            "deadline": "2026-11-23T02:10:52.123456789Z",
            "model": link,
        }

    def updates(self) -> list[httpx.Request]:
        return [r for r in self.requests if "ce-id" in r.headers]

    def events(self) -> list[dict[str, Any]]:
        kind = "application/cloudevents+json"
        return [
            json.loads(r.content) for r in self.requests if r.headers.get("content-type") == kind
        ]


DONE = {"state": "done", "round": 3}


def test_join_says_who_and_keeps_the_token() -> None:
    gateway = Gateway()
    client = gateway.client(join_token="the job's secret")
    client.join()
    assert client.token == "secret-of-alice"
    assert client.heartbeat == 20.0
    (request,) = gateway.requests
    assert request.method == "POST"
    assert request.url.path == f"{BASE}/events"
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert request.headers["authorization"] == "Bearer the job's secret"
    event = json.loads(request.content)
    assert event["specversion"] == "1.0"
    assert event["type"] == "dev.lifl.fl.client.available.v1"
    assert event["source"] == SOURCE
    assert (event["fljob"], event["flclient"]) == ("digits", "alice")
    assert event["data"] == {"role": "trainer"}
    client.join("evaluator")
    again = gateway.events()[1]
    assert again["id"] != event["id"]
    assert again["data"] == {"role": "evaluator"}


def test_join_without_secret_sends_none() -> None:
    gateway = Gateway()
    gateway.client().join()
    assert "authorization" not in gateway.requests[0].headers


@pytest.mark.parametrize("answer", [{}, {"token": "t", "heartbeat": "soon"}, []])
def test_join_reads_no_nonsense(answer: object) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    with pytest.raises(LiflError):
        Client("http://gw", "j", "c", transport=transport).join()


def test_update_on_the_wire() -> None:
    gateway = Gateway()
    client = gateway.client()
    client.join()
    tensors: Model = {"w": np.arange(3, dtype=np.float32), "n": np.array(5)}
    receipt = client.submit(tensors, round=3, samples=120, dtype="f16", kind="diff")
    assert (receipt.id, receipt.duplicate) == ("digits.3.alice.0", False)
    assert receipt.digest == "crc32c:00000000"
    (request,) = gateway.updates()
    time = request.headers["ce-time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time)
    ce = {k: v for k, v in request.headers.items() if k.startswith("ce-")}
    assert ce == {
        "ce-specversion": "1.0",
        "ce-id": "digits.3.alice.0",
        "ce-source": SOURCE,
        "ce-type": "dev.lifl.fl.update.submitted.v1",
        "ce-subject": "jobs/digits/rounds/000003",
        "ce-time": time,
        "ce-fljob": "digits",
        "ce-flround": "3",
        "ce-flclient": "alice",
        "ce-flsamples": "120",
        "ce-flkind": "diff",
        "ce-fldtype": "f16",
    }
    assert request.headers["content-type"] == "application/vnd.safetensors"
    assert request.headers["authorization"] == "Bearer secret-of-alice"
    assert request.headers["content-length"] == str(len(request.content))
    assert "transfer-encoding" not in request.headers
    sent = decode(bytearray(request.content))
    np.testing.assert_array_equal(sent["w"], tensors["w"].astype(np.float16), strict=True)
    np.testing.assert_array_equal(sent["n"], tensors["n"], strict=True)
    # The SDK of the specification's authors reads the same.
    event = from_http_event(HTTPMessage(dict(request.headers), b""))
    assert event.get_subject() == "jobs/digits/rounds/000003"
    assert event.get_extension("flsamples") == "120"


def test_metrics_on_the_wire() -> None:
    gateway = Gateway()
    client = gateway.client()
    client.join()
    client.metrics(3, 360, {"accuracy": np.float32(0.5)})  # type: ignore[dict-item]
    event = gateway.events()[1]
    assert event["type"] == "dev.lifl.fl.client.metrics.v1"
    assert event["source"] == SOURCE
    assert event["subject"] == "jobs/digits/rounds/000003"
    assert event["data"] == {"round": 3, "samples": 360, "metrics": {"accuracy": 0.5}}
    assert gateway.requests[1].headers["authorization"] == "Bearer secret-of-alice"
    with pytest.raises(ValueError, match="nan"):
        client.metrics(3, 360, {"loss": float("nan")})


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.submit({"w": np.zeros(1, np.float32)}, 1, samples=0),
        lambda c: c.submit({"w": np.zeros(1, np.float32)}, 1, samples=-1),
        lambda c: c.submit({"w": np.zeros(1, np.float32)}, 1, samples=1 << 64),
        lambda c: c.submit({"w": np.zeros(1, np.float32)}, 1, 1, kind="grad"),
        lambda c: c.submit({"w": np.zeros(1, np.float32)}, 1, 1, dtype="i8"),
        lambda c: c.model(round=1, task=object()),
        lambda c: Client("http://gw", "j", "a/b"),
        lambda c: Client("http://gw", "j\n", "a"),
        lambda c: Client("http://gw", "", "a"),
    ],
)
def test_misuse_makes_no_request(call: Callable[[Client], object]) -> None:
    gateway = Gateway()
    with pytest.raises(ValueError, match=r"."):
        call(gateway.client())
    assert gateway.requests == []


def test_task_is_read_whole() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(3), {"state": "wait", "round": 2, "reason": "not selected"}]
    client = gateway.client()
    client.join()
    task = client.task(wait=7)
    assert (task.state, task.round, task.model_round) == ("train", 3, 2)
    assert task.deadline == datetime(2026, 11, 23, 2, 10, 52, 123456, timezone.utc)
    assert task.model_url == f"{BASE}/model?round=2"
    request = gateway.requests[1]
    assert dict(request.url.params) == {"client": "alice", "wait": "7s"}
    task = client.task()
    assert (task.state, task.reason, task.model_url) == ("wait", "not selected", None)


def test_model_is_verified() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(3)]
    client = gateway.client()
    client.join()
    task = client.task()
    model = client.model(task=task)
    assert gateway.requests[-1].url.query == b"round=2"
    np.testing.assert_array_equal(model["n"], np.array(4), strict=True)
    assert list(client.model(round=1)) == list(model)
    assert gateway.requests[-1].url.query == b"round=1"
    client.model()
    assert gateway.requests[-1].url.query == b""
    gateway.model = gateway.model[:-1] + b"\x01"
    with pytest.raises(ModelCorrupt, match="sha256"):
        client.model(task=task)


def test_token_stays_with_its_gateway() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(1)]
    gateway.tasks[0]["model"]["url"] = "http://elsewhere:8080/model"
    client = gateway.client()
    client.join()
    with pytest.raises(Rejected):
        client.model(task=client.task())
    assert gateway.requests[-1].url.host == "elsewhere"
    assert "authorization" not in gateway.requests[-1].headers


def add_one(model: Model, round: int) -> tuple[Model, int, dict[str, float]]:
    return {name: array + 1 for name, array in model.items()}, 10 * round, {"loss": 0.5}


def test_train_runs_to_the_end() -> None:
    gateway = Gateway()
    gateway.tasks = [
        {"state": "wait", "round": 0},
        gateway.train(1),
        gateway.train(2),
        dict(DONE),
    ]
    last = gateway.client().train(add_one)
    assert (last.state, last.round) == ("done", 3)
    assert [r.headers["ce-id"] for r in gateway.updates()] == [
        "digits.1.alice.0",
        "digits.2.alice.0",
    ]
    assert [r.headers["ce-flsamples"] for r in gateway.updates()] == ["10", "20"]
    # Metrics are of the model that was given, which the round before made.
    assert [e["data"]["round"] for e in gateway.events()[1:]] == [0, 1]
    sent = decode(bytearray(gateway.updates()[0].content))
    np.testing.assert_array_equal(sent["w"], np.ones(3, np.float32), strict=True)


def test_train_raises_when_the_job_fails() -> None:
    gateway = Gateway({"state": "failed", "round": 1, "reason": "no clients for 90s"})
    with pytest.raises(JobFailed, match="no clients for 90s"):
        gateway.client().train(add_one)


def test_train_goes_on_after_a_closed_round() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(1), dict(DONE)]
    gateway.update_status = 410
    assert gateway.client().train(add_one).state == "done"


def test_train_asked_again_sends_the_same_again() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(1), gateway.train(1), gateway.train(2), dict(DONE)]
    rounds: list[int] = []

    def once(model: Model, round: int) -> tuple[Model, int, None]:
        rounds.append(round)
        return {name: array + len(rounds) for name, array in model.items()}, 1, None

    gateway.client().train(once)
    assert rounds == [1, 2]
    one, again, two = gateway.updates()
    assert one.headers["ce-id"] == again.headers["ce-id"] == "digits.1.alice.0"
    assert one.content == again.content != two.content


def test_train_joins_again_when_its_token_is_forgotten() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(1), gateway.train(1), dict(DONE)]
    rounds: list[int] = []

    def forget(model: Model, round: int) -> tuple[Model, int, None]:
        rounds.append(round)
        gateway.token = "new-secret"
        return model, 1, None

    gateway.client().train(forget)
    # The work is not lost with the token.
    assert rounds == [1]
    assert [r.headers["authorization"] for r in gateway.updates()] == [
        "Bearer secret-of-alice",
        "Bearer new-secret",
    ]


def test_train_does_not_insist_where_it_is_not_wanted() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, json={"token": "t", "heartbeat": "20s"})
        return httpx.Response(401, json={"code": "no-token"})

    client = Client("http://gw", "j", "c", transport=httpx.MockTransport(refuse))
    with pytest.raises(Rejected, match="no-token"):
        client.train(add_one)


def test_long_training_is_heard_of() -> None:
    gateway = Gateway()
    gateway.tasks = [gateway.train(1), dict(DONE)]
    gateway.heartbeat = "20ms"

    def until_heard(model: Model, round: int) -> tuple[Model, int, None]:
        assert gateway.polled.wait(60)
        return model, 1, None

    gateway.client().train(until_heard)
    assert gateway.polled.is_set()
