"""The fl-update profile of CloudEvents: who speaks, of which job and round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from cloudevents.core.bindings import http
from cloudevents.core.v1.event import CloudEvent

AVAILABLE = "dev.lifl.fl.client.available.v1"
METRICS = "dev.lifl.fl.client.metrics.v1"
UPDATE = "dev.lifl.fl.update.submitted.v1"
SAFETENSORS = "application/vnd.safetensors"


@dataclass(frozen=True)
class Speaker:
    """A client of a job, as every event of it says."""

    namespace: str
    job: str
    client: str

    def event(
        self,
        kind: str,
        ident: str,
        round: int,
        extensions: Mapping[str, str] | None = None,
        data: dict[str, Any] | None = None,
        content_type: str | None = None,
    ) -> CloudEvent:
        """An event of type `kind` as of now."""
        attributes: dict[str, Any] = {
            "specversion": "1.0",
            "id": ident,
            "source": f"/namespaces/{self.namespace}/jobs/{self.job}/clients/{self.client}",
            "type": kind,
            "subject": f"jobs/{self.job}/rounds/{round:06}",
            "time": datetime.now(timezone.utc),
            "fljob": self.job,
            "flround": round,
            "flclient": self.client,
            **(extensions or {}),
        }
        if content_type is not None:
            attributes["datacontenttype"] = content_type
        return CloudEvent(attributes, data)


def binary_headers(event: CloudEvent) -> dict[str, str]:
    """Headers of the binary mode; the body is the caller's."""
    return http.to_binary_event(event).headers


def structured(event: CloudEvent) -> tuple[dict[str, str], bytes]:
    """Headers and body of the structured JSON mode."""
    message = http.to_structured_event(event)
    return message.headers, message.body
