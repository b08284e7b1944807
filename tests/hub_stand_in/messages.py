"""What goes over the wire: requests, answers, errors, and faults that tests ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """A request that the stand-in received. `path` is as it was sent, without query."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    origin: str
    status: int | None = None


@dataclass
class Response:
    """An answer; a `body` that is neither bytes nor None is sent as JSON."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the requests that match, at most `times` times (None: always).

    Args:
        matches: Which requests.
        response: Sent instead of the true answer.
        delay: Seconds to wait before the answer.
        keep_bytes: Close the connection after so many bytes of the body.
    """

    matches: Callable[[Request], bool]
    response: Response | None = None
    delay: float = 0.0
    keep_bytes: int | None = None
    times: int | None = 1


class HubError(Exception):
    """An error that the Hub answers with, by status and its own code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.response = Response(
            status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        )


# Method, pattern of the whole path, and the function that answers, called with the stand-in, the request and the
# pattern's groups.
Route = tuple[str, str, Callable[..., Response]]
REPO_ID = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"


def require_token(request: Request) -> None:
    """Refuse a request that carries no token."""
    if not request.headers.get("authorization", "").startswith("Bearer "):
        raise HubError(401, "", "Invalid username or password.")
