"""Tracking servers that are ill, each over a real socket of this machine."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ILLNESSES = (
    "dead",
    "silent",
    "slow",
    "500",
    "403",
    "garbage",
    "truncated",
    "half json",
    "empty object",
    "drips",
    "answers once",
    "dies",
)
SLOW_S = 5.0
REBINDING = b"Invalid Host header - possible DNS rebinding attack detected"

SAYS: dict[str, tuple[int, bytes, int | None]] = {
    "500": (500, b"oops", None),
    "dies": (500, b"database is gone", None),
    "403": (403, REBINDING, None),
    "garbage": (200, b"\x00\xff<html>login</html>", None),
    "truncated": (200, b'{"experiment": {"experiment', 500),
    "half json": (200, b'{"experiment": {"experiment', None),
    "empty object": (200, b"{}", None),
}
"""What some of them say to everything: status, body, and the length that they claim it has."""


class Sick(BaseHTTPRequestHandler):
    """Passes requests on to the healthy server `behind`, in the manner of its illness."""

    illness = ""
    behind = ""
    healthy_calls = 0
    calls: list[str]

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.calls.append(self.path)
        ill = {"dies": len(self.calls) > self.healthy_calls, "answers once": len(self.calls) > 1}
        if not ill.get(self.illness, True):
            self.pass_on(body)
        elif self.illness in SAYS:
            self.say(*SAYS[self.illness])
        elif self.illness == "drips":
            self.drip()
        else:
            time.sleep(SLOW_S if self.illness == "slow" else 60)
            self.pass_on(body)

    def drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(60):
            self.wfile.write(b" ")
            time.sleep(1)

    def pass_on(self, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.behind.removeprefix("http://"), timeout=30)
        connection.request(self.command, self.path, body, {"Content-Type": self.headers["Content-Type"]})
        answer = connection.getresponse()
        self.say(answer.status, answer.read())
        connection.close()

    def say(self, status: int, body: bytes, claimed: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever asked has given up
            super().handle()

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names of the standard library

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def sick_server(illness: str, behind: str = "", healthy_calls: int = 0) -> Iterator[str]:
    """Yield the address of a server with this illness, in front of the healthy server `behind`."""
    if illness == "dead":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))  # bound and not listening: refuses, and nobody else gets the port
            yield f"http://127.0.0.1:{s.getsockname()[1]}"
        return
    facts = {"illness": illness, "behind": behind, "healthy_calls": healthy_calls, "calls": []}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Sick,), facts))
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
