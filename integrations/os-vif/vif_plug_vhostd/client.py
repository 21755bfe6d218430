"""Requests to vhostd's API: HTTP over a UNIX socket, each within a time limit, whatever is at the other end.

A request has a connection of its own, so threads, green threads and forks share nothing. Every request can be
repeated, and is while the daemon restarts or is too busy: whoever asks os-vif for a plug asks only once.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlencode

#: For how long the daemon may be away, s. It restarts in a fraction of this.
ABSENCE_MAX = 3.0
#: Between two attempts, s.
PAUSE = 0.05
#: Of an answer.
BYTES_MAX = 1 << 20


class ApiError(Exception):
    """A request without success; the text is for people.

    ``problem`` is what the daemon said, an RFC 9457 problem as a dict; empty if it said nothing.
    """

    def __init__(self, text: str, problem: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.problem = problem or {}


class _Absent(Exception):
    """Nobody answers, which may pass. The cause says why."""


class Client:
    """The API on the socket at ``path``. No request takes longer than ``timeout``, in seconds."""

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self.timeout = timeout

    def post(self, resource: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        """Sends ``body`` as JSON and gives the answer, an object with an ``id``.

        :raises ApiError: the daemon refuses, is not there, is too slow, or is something else
        """
        target = f"{resource}?{urlencode(query)}" if query else resource
        content = json.dumps(body).encode()
        start = time.monotonic()
        end = start + self.timeout
        absent_until = min(start + ABSENCE_MAX, end)
        while True:
            try:
                status, answer = self._exchange(target, content, end)
            except _Absent as error:
                if time.monotonic() + PAUSE >= absent_until:
                    text = f"vhostd does not answer on {self.path}: {error.__cause__}. Is the service running?"
                    raise ApiError(text) from error
            else:
                if status in (200, 201) and "id" in answer:
                    return answer
                # Service Unavailable: it is starting, or has too many callers at once.
                if status != 503 or time.monotonic() + PAUSE >= end:
                    raise ApiError(_text(status, answer), answer)
            time.sleep(PAUSE)

    def _exchange(self, target: str, content: bytes, end: float) -> tuple[int, dict[str, Any]]:
        connection = _Connection(self.path, end)
        try:
            connection.connect()
            try:
                connection.request("POST", target, content, {"Content-Type": "application/json"})
            except ConnectionError:
                pass  # Who refuses a request half-way has answered before closing.
            with connection.getresponse() as response:
                return response.status, _content(response)
        except PermissionError as error:
            text = f"may not open {self.path}: {error}. Group and mode of it are [api] in vhostd's configuration"
            raise ApiError(text) from error
        except TimeoutError as error:
            raise ApiError(f"vhostd on {self.path} did not answer within {self.timeout:g} s") from error
        # Not there, going away, or (EAGAIN) with more callers waiting than its queue holds.
        except (FileNotFoundError, ConnectionError, BlockingIOError, http.client.IncompleteRead) as error:
            raise _Absent from error
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise ApiError(f"{self.path} is not vhostd's API: {error!r}") from error
        finally:
            connection.close()


def _content(response: http.client.HTTPResponse) -> dict[str, Any]:
    content = response.read(BYTES_MAX + 1)
    if len(content) > BYTES_MAX:
        raise ValueError(f"an answer of more than {BYTES_MAX} bytes")
    if response.length:
        raise http.client.IncompleteRead(content, response.length)
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError(f"an answer that is no object: {content[:80]!r}")
    return value


def _text(status: int, problem: dict[str, Any]) -> str:
    detail = problem.get("detail") or f"vhostd answers with HTTP status {status} and no reason"
    more = [f"{name}: {problem[name]}" for name in ("field", "hint") if problem.get(name)]
    return f"{detail} ({'; '.join(more)})" if more else str(detail)


class _Connection(http.client.HTTPConnection):
    """HTTP over a UNIX socket, on which nothing waits beyond ``end``, a time of the monotonic clock."""

    def __init__(self, path: str, end: float) -> None:
        super().__init__("vhostd")
        self.path = path
        self.end = end

    def connect(self) -> None:
        self.sock = _Socket(self.end)
        self.sock.settimeout(self.sock.left())
        self.sock.connect(self.path)


class _Socket(socket.socket):
    """Reads have one limit together, in however many pieces the bytes come. (connect and sendall have it anyway.)"""

    def __init__(self, end: float) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.end = end

    def left(self) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def recv_into(self, *args: Any) -> int:
        self.settimeout(self.left())
        return super().recv_into(*args)
