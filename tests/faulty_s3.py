"""A proxy on 127.0.0.1 between a client and an S3 server, which goes wrong as it is told.

The Host header is passed on unchanged, so signatures stay valid. A fault is asked for by method and part of the path
and counts down; what no fault is for is passed through.
"""

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import SplitResult, urlsplit

What = Literal[
    "refuse",  # answer `status` and `code`, pass nothing on
    "apply and refuse",  # pass on, then answer `status` and `code` instead of what the server said
    "apply and hang",  # pass on, then say nothing for `hang_s`, and close
    "apply and close",  # pass on, then close
    "close",  # close, pass nothing on
    "cut",  # half of the body under the full Content-Length
    "shorten",  # half of the body under a Content-Length that fits it, from a server that keeps no checksums
    "stale",  # the first answer that this path ever had here, not the present one
]


@dataclass
class Fault:
    """What goes wrong, with which requests, and how often."""

    what: What
    method: str
    path: str
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    hang_s: float = 3.0


@dataclass
class Answer:
    """What a server said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Proxy:
    """The proxy's address, the faults that are still to come, and what passed: (method, path, status).

    Every request takes `delay_s` longer, as over a long line; `times` says when each one began and ended.
    """

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    first: dict[str, Answer] = field(default_factory=dict)
    delay_s: float = 0.0
    times: list[tuple[float, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Return the fault of this request and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def round_trips(self) -> int:
        """Return the length of the longest chain of requests of which each began after the one before had ended."""
        trips, last = 0, 0.0
        for began, ended in sorted(self.times, key=lambda t: t[1]):
            if began >= last:
                trips, last = trips + 1, ended
        return trips

    def spent(self) -> bool:
        """Return whether every fault happened as often as it was asked for."""
        return all(fault.times == 0 for fault in self.faults)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client; `server` is a `_Server`."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def handle_any(self) -> None:
        """Pass the request on, or do what its fault says."""
        proxy = self.server.proxy
        began = time.monotonic()
        time.sleep(proxy.delay_s)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.fault_for(self.command, self.path)
        what = fault.what if fault else None
        answer = None if what in ("refuse", "close") else self.passed_on(body)
        if fault is not None and what in ("refuse", "apply and refuse"):
            answer = error(fault)
        elif what == "stale":
            answer = proxy.first[self.path]
        if answer is None or what in ("apply and hang", "apply and close"):
            proxy.seen.append((self.command, self.path, 0))
            time.sleep(fault.hang_s if fault and what == "apply and hang" else 0)
            self.close_connection = True
            return
        proxy.seen.append((self.command, self.path, answer.status))
        proxy.times.append((began, time.monotonic()))
        self.say(answer, what)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815 - names of http.server

    def passed_on(self, body: bytes) -> Answer:
        """Return what the real server says."""
        upstream, proxy = self.server.upstream, self.server.proxy
        connection = http.client.HTTPConnection(str(upstream.hostname), upstream.port, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            answer = Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()
        if self.command == "GET" and answer.status == 200:
            with proxy.lock:
                proxy.first.setdefault(self.path, answer)
        return answer

    def say(self, answer: Answer, what: str | None) -> None:
        """Answer the client, with half of the body where the fault says so."""
        half = answer.body[: len(answer.body) // 2]
        self.send_response(answer.status)
        dropped = ("content-length", "transfer-encoding", "connection", "date", "server")
        if what == "shorten":
            dropped += ("x-amz-checksum-sha256",)
        for name, value in answer.headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(half if what == "shorten" else answer.body)))
        self.end_headers()
        self.wfile.write(half if what in ("cut", "shorten") else answer.body)
        if what == "cut":
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a connection that is kept open must not hold the test

    def __init__(self, upstream: SplitResult, faults: list[Fault]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.proxy = Proxy(endpoint=f"http://127.0.0.1:{self.server_port}", faults=faults)

    def handle_error(self, *args: object) -> None:
        """Say nothing of clients that gave up waiting."""


@contextlib.contextmanager
def faulty(server: str, *faults: Fault) -> Iterator[Proxy]:
    """Yield a running proxy in front of `server` (http://127.0.0.1:port)."""
    running = _Server(urlsplit(server), list(faults))
    thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield running.proxy
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def error(fault: Fault) -> Answer:
    """Return an error as S3 says it."""
    body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>told to</Message></Error>".encode()
    return Answer(fault.status, [("Content-Type", "application/xml")], body)
