"""Uploads and downloads over real sockets: lengths, cut connections, early refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from lifl_client import Client, Retry, UpdateRejected
from lifl_client.tensors import Encoded, decode

MODEL = {"w": np.arange(3 << 20, dtype=np.float32), "n": np.array(9)}
FILE = b"".join(Encoded(MODEL))


class Gateway(BaseHTTPRequestHandler):
    """Does to each upload and download what `acts` says next."""

    protocol_version = "HTTP/1.1"
    acts: ClassVar[list[str]] = []
    uploads: ClassVar[list[tuple[str, str | None, bytes]]] = []

    def do_POST(self) -> None:
        act = self.acts.pop(0)
        length = int(self.headers["content-length"])
        if act == "refuse":
            # Answers before the body has come, as for an update beyond the quota.
            self.answer(413, json.dumps({"code": "too-large"}).encode(), close=True)
            while length > 0 and (piece := self.rfile.read(min(length, 1 << 16))):
                length -= len(piece)
            return
        body = self.rfile.read(length // 2 if act == "cut" else length)
        self.uploads.append((self.headers["ce-id"], self.headers.get("transfer-encoding"), body))
        if act == "cut":
            self.close_connection = True
        else:
            self.answer(202, b'{"round": 1}')

    def do_GET(self) -> None:
        if self.acts.pop(0) == "cut":
            self.send_response(200)
            self.send_header("content-length", str(len(FILE)))
            self.end_headers()
            self.wfile.write(FILE[: len(FILE) // 2])
            self.close_connection = True
        else:
            self.answer(200, FILE)

    def answer(self, status: int, body: bytes, close: bool = False) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if close:
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: a failing test shows the client's side."""


@pytest.fixture
def client() -> Iterator[Client]:
    Gateway.acts.clear()
    Gateway.uploads.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    with Client(url, "j", "c", retry=Retry(sleep=lambda _: None)) as client:
        yield client
    server.shutdown()
    server.server_close()
    thread.join()


def test_upload_has_a_length_and_arrives_whole(client: Client) -> None:
    Gateway.acts[:] = ["take"]
    client.submit(MODEL, round=1, samples=1)
    assert Gateway.uploads == [("j.1.c.0", None, FILE)]


def test_cut_upload_is_sent_again_under_its_id(client: Client) -> None:
    Gateway.acts[:] = ["cut", "take"]
    client.submit(MODEL, round=1, samples=1)
    (first, _, half), (second, _, whole) = Gateway.uploads
    assert first == second == "j.1.c.0"
    assert len(half) < len(whole)
    assert whole == FILE


def test_refusal_before_the_body_is_understood(client: Client) -> None:
    Gateway.acts[:] = ["refuse"]
    with pytest.raises(UpdateRejected, match="too-large"):
        client.submit(MODEL, round=1, samples=1)


def test_cut_download_is_fetched_again(client: Client) -> None:
    Gateway.acts[:] = ["cut", "serve"]
    model = client.model()
    assert Gateway.acts == []
    for name, array in decode(bytearray(FILE)).items():
        np.testing.assert_array_equal(model[name], array, strict=True)
