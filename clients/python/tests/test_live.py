"""Against a running LIFL; nothing is mocked.

Wanted: `python tests/make_models.py DIR`, a `lifl up` whose jobs start from those models, and
    LIFL_URL         http://127.0.0.1:8080
    LIFL_JOB         job of three.safetensors: 3 rounds, clientsPerRound 3, minClients 3
    LIFL_RESNET_JOB  job of resnet18.safetensors: 1 round, clientsPerRound 2, minClients 2
LIFL_NAMESPACE (default) and LIFL_JOIN_TOKEN are optional. Each job is used up by one run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
from make_models import resnet18

from lifl_client import Client, Retry, Task
from lifl_client.tensors import Array, Model

URL = os.environ.get("LIFL_URL")
JOB = os.environ.get("LIFL_JOB")
RESNET_JOB = os.environ.get("LIFL_RESNET_JOB")
PATIENCE = 300.0
"""Seconds after which a hanging run is a failure; no measure of speed."""

logging.basicConfig(level=logging.INFO)


def connect(job: str, name: str) -> Client:
    assert URL is not None
    return Client(
        URL,
        job=job,
        client=name,
        namespace=os.environ.get("LIFL_NAMESPACE", "default"),
        join_token=os.environ.get("LIFL_JOIN_TOKEN"),
        retry=Retry(total=60.0),
    )


def together(work: dict[str, Callable[[], Task]]) -> dict[str, Task]:
    """Each in a thread of its own; the first failure is the test's."""
    with ThreadPoolExecutor(len(work)) as pool:
        running = {name: pool.submit(one) for name, one in work.items()}
        return {name: one.result(PATIENCE) for name, one in running.items()}


class LeastSquares:
    """A client's own samples of one linear truth, and everything it was given and sent."""

    def __init__(self, seed: int, samples: int) -> None:
        random = np.random.default_rng(seed)
        self.x = random.standard_normal((samples, 4)).astype(np.float32)
        truth = np.arange(12, dtype=np.float32).reshape(4, 3) / 12
        self.y = self.x @ truth + np.float32(0.5)
        self.given: dict[int, Model] = {}
        self.sent: dict[int, Model] = {}

    def loss(self, model: Model) -> float:
        return float(np.mean((self.x @ model["w"] + model["b"] - self.y) ** 2))

    def train(self, model: Model, round: int) -> tuple[Model, int, dict[str, float]]:
        self.given[round] = {name: array.copy() for name, array in model.items()}
        loss = self.loss(model)
        for _ in range(20):
            error = (self.x @ model["w"] + model["b"] - self.y) / np.float32(len(self.x))
            model["w"] -= np.float32(0.3) * self.x.T @ error
            model["b"] -= np.float32(0.3) * error.sum(axis=0)
        self.sent[round] = model
        return model, len(self.x), {"loss": loss}


def mean(parts: list[tuple[int, Array]]) -> Array:
    """The weighted mean, in more precision than the aggregators have."""
    weight = sum(samples for samples, _ in parts)
    total = np.zeros(parts[0][1].shape)
    for samples, array in parts:
        total += samples * array.astype(np.float64)
    return total / weight


@pytest.mark.skipif(
    not (URL and JOB), reason="needs a running LIFL: set LIFL_URL and LIFL_JOB (see this file)"
)
def test_three_clients_finish_a_job() -> None:
    assert JOB is not None
    data = {
        name: LeastSquares(seed, samples)
        for seed, (name, samples) in enumerate([("alice", 40), ("bob", 120), ("carol", 360)])
    }
    clients = {name: connect(JOB, name) for name in data}
    try:
        # All join before any trains, so that round 1 has its three.
        for client in clients.values():
            client.join()
        ends = together(
            {
                name: lambda name=name: clients[name].train(data[name].train, wait=5)  # type: ignore[misc]
                for name in clients
            }
        )
        final = clients["alice"].model()
    finally:
        for client in clients.values():
            client.close()
    assert {end.state for end in ends.values()} == {"done"}
    assert {end.round for end in ends.values()} == {3}
    for one in data.values():
        assert list(one.sent) == [1, 2, 3]
        assert one.given[1].keys() == {"w", "b"}
        for array in one.given[1].values():
            assert not array.any()
    # Every round's model is the weighted mean of exactly what was sent in it.
    for round, model in [(1, data["alice"].given[2]), (2, data["bob"].given[3]), (3, final)]:
        assert (model["w"].shape, model["b"].shape) == ((4, 3), (3,))
        for name, array in model.items():
            wanted = mean([(len(one.x), one.sent[round][name]) for one in data.values()])
            np.testing.assert_allclose(
                array, wanted, rtol=1e-5, atol=1e-6, err_msg=f"{name}, round {round}"
            )
    for one in data.values():
        assert one.loss(final) < 0.01 * one.loss(one.given[1])


@pytest.mark.skipif(
    not (URL and RESNET_JOB),
    reason="needs a running LIFL: set LIFL_URL and LIFL_RESNET_JOB (see this file)",
)
def test_resnet18_state_as_f32_and_as_f16() -> None:
    assert RESNET_JOB is not None
    initial = resnet18()
    senders: dict[str, tuple[int, Literal["f32", "f16"]]] = {
        "dora": (100, "f32"),
        "emil": (300, "f16"),
    }
    given: dict[str, Model] = {}
    sent: dict[str, Model] = {}

    def train(name: str) -> Callable[[Model, int], tuple[Model, int, None]]:
        samples, dtype = senders[name]

        def one(model: Model, round: int) -> tuple[Model, int, None]:
            given[name] = model
            random = np.random.default_rng(samples)
            update: Model = {}
            for key, array in model.items():
                if array.dtype == np.int64:
                    # Counts on as training does; the global model's value is to stay.
                    update[key] = array + samples
                    continue
                step = random.standard_normal(array.shape).astype(np.float32) / 64
                update[key] = array + step
            sent[name] = {
                key: array.astype(np.float16)
                if dtype == "f16" and array.dtype.kind == "f"
                else array
                for key, array in update.items()
            }
            return update, samples, None

        return one

    clients = {name: connect(RESNET_JOB, name) for name in senders}
    try:
        for client in clients.values():
            client.join()
        ends = together(
            {
                name: lambda name=name: clients[name].train(  # type: ignore[misc]
                    train(name), dtype=senders[name][1], wait=5
                )
                for name in clients
            }
        )
        final = clients["dora"].model()
    finally:
        for client in clients.values():
            client.close()
    assert {end.state for end in ends.values()} == {"done"}
    for model in given.values():
        assert model.keys() == initial.keys()
        for key, array in initial.items():
            np.testing.assert_array_equal(model[key], array, strict=True, err_msg=key)
    assert final.keys() == initial.keys()
    for key, array in initial.items():
        assert (final[key].dtype, final[key].shape) == (array.dtype, array.shape), key
        if key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(final[key], array, strict=True, err_msg=key)
            continue
        wanted = mean([(senders[name][0], sent[name][key]) for name in senders])
        np.testing.assert_allclose(final[key], wanted, rtol=1e-5, atol=1e-6, err_msg=key)
