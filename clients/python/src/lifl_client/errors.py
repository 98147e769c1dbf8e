"""What can go wrong, and whether it is the caller's to mend."""

from __future__ import annotations

import json

import httpx


class LiflError(Exception):
    """Any failure of this package that is not a misuse (those are ValueError)."""


class Unreachable(LiflError):
    """The gateway could not be reached, or broke off, until the retry budget ran out.

    Whether it took the last request is unknown; sending the same update again is safe.
    """


class ModelCorrupt(LiflError):
    """The model that arrived is not the one announced, or is not safetensors."""


class JobFailed(LiflError):
    """The job failed; the text is the coordinator's reason."""


class Rejected(LiflError):
    """The gateway refused a request; the fields are those of its RFC 9457 problem document."""

    def __init__(self, status: int, code: str, title: str, detail: str) -> None:
        """Keep the fields; `code` is the stable word for programs, "" when there was none."""
        super().__init__(f"{status} {code or title}: {detail or title}")
        self.status = status
        self.code = code
        self.title = title
        self.detail = detail

    @classmethod
    def of(cls, response: httpx.Response) -> Rejected:
        """Read a response's problem document; of other bodies the beginning is kept as detail."""
        kind = RoundClosed if cls is UpdateRejected and response.status_code == 410 else cls
        title = response.reason_phrase
        try:
            problem = json.loads(response.content)
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            return kind(response.status_code, "", title, response.text[:200])
        return kind(
            response.status_code,
            str(problem.get("code", "")),
            str(problem.get("title", title)),
            str(problem.get("detail", "")),
        )


class UpdateRejected(Rejected):
    """This update will never be taken as it is: wrong tensors, too large, no token."""


class RoundClosed(Rejected):
    """The update came too late (or too early) for its round; ask for the next task."""
